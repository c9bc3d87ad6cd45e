import pytest

from loram_cli.arch.registry import family_for
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.memory.presets import load_preset, preset_names

PUBLISHED_PARAMS = {
    "gemma2-9b": 9241705984,
    "gemma2-27b": 27227128320,
    "glm4.5-106b": 106852251264,
    "gpt-oss-20b": 20914757184,
    "gpt-oss-120b": 116829156672,
    "llama2-7b": 6738415616,
    "llama2-13b": 13015864320,
    "llama2-70b": 68976648192,
    "llama3.1-8b": 8030261248,
    "llama3.1-70b": 70553706496,
    "mistral-7b": 7241732096,
    "mixtral-8x7b": 46702792704,
    "olmo-7b": 6888095744,
    "phi2-2.7b": 2779683840,
    "phi3-3.8b": 3821079552,
    "phi4-14b": 14659507200,
    "qwen3-8b": 8190735360,
    "qwen3-14b": 14768307200,
    "qwen3-32b": 32762123264,
    "qwen3moe-30b-a3b": 30532122624,
    "qwen3moe-235b-a22b": 235093634560,
}

# In billions, as the models' pages on the hub state them; a tied head that is stored is not counted.
STATED_BILLIONS = {
    "command_r-35b": "35.0",
    "deepseek_v2-236b": "236",
    "deepseek_v3-671b": "671",
    "ernie4.5-0.3b": "0.361",
    "exaone4-32b": "32.0",
    "falcon-7b": "6.92",
    "falcon-40b": "41.3",
    "gemma-7b": "8.54",
    "gemma3-1b": "1.00",
    "glm4-9b": "9.40",
    "glm4.7_flash-30b": "30",
    "granite3.3-8b": "8.17",
    "internlm3-8b": "8.80",
    "mistral_small-24b": "23.6",
    "olmo2-13b": "13.7",
    "pythia-12b": "11.8",
    "seed_oss-36b": "36.2",
    "smollm3-3b": "3.08",
    "starcoder2-15b": "16.0",
    "vaultgemma-1b": "1.04",
}


def test_names_are_ordered_by_generation_and_then_by_size():
    assert set(preset_names()) == {*PUBLISHED_PARAMS, *STATED_BILLIONS}
    known = tuple(name for name in preset_names() if name in PUBLISHED_PARAMS)
    assert known == tuple(PUBLISHED_PARAMS)


@pytest.mark.parametrize(("name", "stated"), STATED_BILLIONS.items())
def test_preset_has_the_stated_billions(name, stated):
    config = load_preset(name)
    billions = count_params(family_for(config, name), config).total / 1e9
    assert f"{billions:.{len(stated.partition('.')[2])}f}" == stated


@pytest.mark.parametrize(("name", "published"), PUBLISHED_PARAMS.items())
def test_preset_has_the_published_parameter_count(name, published):
    config = load_preset(name)
    assert count_params(family_for(config, name), config).total == published


@pytest.mark.parametrize(
    "name",
    [*PUBLISHED_PARAMS, *(pytest.param(name, marks=pytest.mark.slow) for name in STATED_BILLIONS)],
)
def test_transformers_builds_the_same_model(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = load_preset(name)
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = family_for(config, name).tensor_shapes(config)
    shapes = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
    # Routers keep the biases that balance their experts as buffers.
    stored = model.state_dict()
    shapes |= {key: tuple(b.shape) for key, b in model.named_buffers() if key in stored}
    assert shapes == expected
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
