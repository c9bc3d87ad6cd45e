import re
from pathlib import Path

import pytest

import loram_cli
from loram_cli.arch.registry import family_for
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.memory.presets import load_preset, preset_names, preset_source

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

# Those of the newest families, from the hub's safetensors metadata in the presets' sources.
METADATA_PARAMS = {
    "hyperclovax-14b": 14748112896,
    "seed_oss-36b": 36151104512,
    "smollm3-3b": 3075098624,
    "vaultgemma-1b": 1038741120,
}

# In billions, as the models' pages on the hub state them; a tied head that is stored is not counted.
STATED_BILLIONS = {
    "apertus-70b": "71",
    "arcee-4.5b": "4.62",
    "command_a-111b": "111",
    "command_r-35b": "35.0",
    "dots1-142b": "143",
    "deepseek_v2-236b": "236",
    "deepseek_v3-671b": "671",
    "command_r7b-8b": "8.03",
    "ernie4.5-0.3b": "0.361",
    "exaone4-32b": "32.0",
    "falcon-7b": "6.92",
    "falcon-40b": "41.3",
    "gemma-7b": "8.54",
    "gemma3-1b": "1.00",
    "glm-9b": "9.40",
    "glm4-9b": "9.40",
    "glm4.7_flash-30b": "30",
    "granite3.3-8b": "8.17",
    "granite3.1moe-3b": "3.3",
    "helium-2b": "2.17",
    "internlm3-8b": "8.80",
    "lfm2-1.2b": "1.17",
    "ministral3-8b": "8.49",
    "mistral_small-24b": "23.6",
    "olmo2-13b": "13.7",
    "olmo3-7b": "7.30",
    "olmo3-32b": "32.2",
    "opt-6.7b": "6.7",
    "pythia-12b": "11.8",
    "sqlcoder-15b": "15.5",
    "starcoder2-15b": "16.0",
    "trinity_mini-26b": "26",
}

EXACT_PARAMS = PUBLISHED_PARAMS | METADATA_PARAMS
# Names that say less than the models have, as their pages do too: Gemma 7B has 8.54 billion.
NAMED_SHORT = ("gemma-7b", "internlm3-8b", "ernie4.5-0.3b", "helium-2b", "granite3.1moe-3b")


def test_names_are_ordered_by_generation_and_then_by_size():
    assert set(preset_names()) == {*EXACT_PARAMS, *STATED_BILLIONS}
    known = tuple(name for name in preset_names() if name in PUBLISHED_PARAMS)
    assert known == tuple(PUBLISHED_PARAMS)


@pytest.mark.parametrize(("name", "stated"), STATED_BILLIONS.items())
def test_preset_has_the_stated_billions(name, stated):
    config = load_preset(name)
    billions = count_params(family_for(config, name), config).total / 1e9
    assert f"{billions:.{len(stated.partition('.')[2])}f}" == stated


@pytest.mark.parametrize(("name", "published"), EXACT_PARAMS.items())
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
    # Models with learned positions have none.
    assert getattr(theirs, "rope_parameters", None) == config.get("rope_parameters")
    assert str(theirs.dtype).removeprefix("torch.") == config["dtype"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_where_it_was_read_and_has_the_size_of_its_name(name):
    source = preset_source(name)
    assert source.model.count("/") == 1
    # A file at one commit, which stays as it was read.
    assert re.fullmatch(r"https://github\.com/[^/]+/[^/]+/blob/[0-9a-f]{40}/.+", source.read_in)
    config = load_preset(name)
    assert "source" not in config
    named = re.search(r"-(\d+(?:\.\d+)?)b", name)
    if named is not None:
        times = count_params(family_for(config, name), config).total / 1e9 / float(named[1])
        assert 0.95 < times < (1.25 if name in NAMED_SHORT else 1.07)


def test_the_page_lists_every_preset():
    text = (Path(loram_cli.__file__).parent / "docs" / "presets.md").read_text("utf-8")
    rows = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in text.splitlines()
            if row.startswith("| `")]  # fmt: skip
    expected = []
    for name in preset_names():
        config = load_preset(name)
        family = family_for(config, name)
        billions = f"{count_params(family, config).total / 1e9:.3g}B"
        expected.append((f"`{name}`", preset_source(name).model, family.family, billions))
    assert rows == expected


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
