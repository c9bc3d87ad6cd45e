import pytest

from loram_cli.arch.registry import family_for
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.memory.presets import load_preset, preset_names

PUBLISHED_PARAMS = {
    "gemma2-9b": 9241705984,
    "gemma2-27b": 27227128320,
    "llama2-7b": 6738415616,
    "llama2-13b": 13015864320,
    "llama2-70b": 68976648192,
    "llama3.1-8b": 8030261248,
    "llama3.1-70b": 70553706496,
    "mistral-7b": 7241732096,
    "olmo-7b": 6888095744,
    "phi2-2.7b": 2779683840,
    "phi3-3.8b": 3821079552,
    "phi4-14b": 14659507200,
    "qwen3-8b": 8190735360,
    "qwen3-14b": 14768307200,
    "qwen3-32b": 32762123264,
}


def test_names_are_ordered_by_generation_and_then_by_size():
    assert preset_names() == tuple(PUBLISHED_PARAMS)


@pytest.mark.parametrize(("name", "published"), PUBLISHED_PARAMS.items())
def test_preset_has_the_published_parameter_count(name, published):
    config = load_preset(name)
    assert count_params(family_for(config, name), config).total == published


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_transformers_builds_the_same_model(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = load_preset(name)
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = family_for(config, name).tensor_shapes(config)
    assert {key: tuple(weight.shape) for key, weight in model.named_parameters()} == expected
    assert theirs.rope_parameters == config["rope_parameters"]
    assert str(theirs.dtype).removeprefix("torch.") == config["dtype"]


def test_each_load_is_a_copy_of_its_own():
    load_preset("llama2-7b")["hidden_size"] = 1
    assert load_preset("llama2-7b")["hidden_size"] == 4096


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match=r"unknown preset 'llama2-70'\ndid you mean 'llama2-70b'"):
        load_preset("llama2-70")


@pytest.mark.parametrize("name", ["", "../presets/llama2-7b", "llama2-7b.json"])
def test_a_preset_is_a_name_and_no_path(name):
    with pytest.raises(UsageError, match="unknown preset"):
        load_preset(name)
