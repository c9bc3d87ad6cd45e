import json
from pathlib import Path

import pytest
from helpers.reporters import WarningRecorder
from helpers.tiny_models import make_base
from safetensors.torch import load_file, save_file

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.oddities import ROPE_KEYS, _of_tokenizer, oddities
from loram_cli.stages.core.lineage import warn_of_oddities


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), max_position_embeddings=64)


def found(base: Path, tmp_path: Path, name: str = "config.json", **changes: object) -> list[str]:
    """Oddities of the base once a file of it is changed."""
    directory = tmp_path / "changed"
    directory.mkdir()
    for file in base.iterdir():
        (directory / file.name).symlink_to(file)
    text = (base / name).read_text()
    (directory / name).unlink()
    (directory / name).write_text(json.dumps({**json.loads(text), **changes}))
    return [line.removeprefix(f"{directory}/") for line in oddities(Model.open(directory))]


ROPE = "config.json: rope_parameters: "
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eos_token_id": -1, "bos_token_id": None}, ""),
        ({"eos_token_id": [0, 258]}, "config.json: eos_token_id 258 is beyond the vocabulary of"),
        ({"bos_token_id": 10**6}, "config.json: bos_token_id 1000000 is beyond"),
        ({"rope_parameters": YARN}, ""),
        ({"rope_parameters": {**YARN, "factr": 2}}, f"{ROPE}'factr': not known to transformers"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, f"{ROPE}factor is 0.5: below 1"),
        ({"rope_parameters": {**YARN, "beta_fast": 0.5}}, f"{ROPE}beta_fast 0.5 is below beta_slo"),
        (
            {"rope_parameters": {**LLAMA3, "low_freq_factor": 4, "high_freq_factor": 4}},
            f"{ROPE}high_freq_factor 4 is not above low_freq_factor 4",
        ),
        (
            {
                "rope_parameters": {
                    **LLAMA3, "low_freq_factor": 1, "high_freq_factor": 4,
                    "original_max_position_embeddings": 64,
                }
            },
            f"{ROPE}original_max_position_embeddings 64 is not below",
        ),
        ({"rope_parameters": {**LONG, "short_factor": [1, 1], "long_factor": [1, 2]}}, ""),
        (
            {"rope_parameters": {**LONG, "short_factor": [1, 1], "long_factor": [1]}},
            f"{ROPE}long_factor has 1 numbers for 2 frequencies",
        ),
    ],
)  # fmt: skip
def test_each_is_told_with_its_place(plain, tmp_path, changes, told):
    lines = found(plain, tmp_path, **changes)
    assert len(lines) == bool(told)
    assert all(line.startswith(told) for line in lines), lines


def test_ends_that_only_the_generation_config_names(plain, tmp_path):
    [line] = found(plain, tmp_path, "generation_config.json", eos_token_id=300)
    assert line.startswith("generation_config.json: eos_token_id 300 is beyond")


@pytest.mark.parametrize("same", [True, False], ids=["equal", "other"])
def test_a_head_of_its_own_beside_a_tied_embedding(same, tmp_path):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"] = head if same else head + 1
    save_file(weights, base / "model.safetensors")
    model, reporter = Model.open(base), WarningRecorder()
    warn_of_oddities(model, reporter)
    assert len(reporter.warnings) == (not same)
    assert all("lm_head.weight has values of its own" in line for line in reporter.warnings)


def test_transformers_knows_the_rotary_settings(caplog):
    """What it warns of as unknown is what is told here."""
    import logging

    from transformers import LlamaConfig
    from transformers.utils import logging as theirs

    known = {**YARN, "original_max_position_embeddings": 1024}
    of_families = {
        "interleaved", "llama_4_scaling_beta", "max_position_embeddings", "mrope_interleaved",
        "mrope_section",
    }  # fmt: skip
    of_kinds = {"high_freq_factor", "low_freq_factor", "long_factor", "short_factor"}
    theirs.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING, "transformers"):
            for key in sorted(ROPE_KEYS - of_families - of_kinds):
                LlamaConfig(rope_parameters={**YARN, key: known.get(key)})
            assert "Unrecognized" not in caplog.text
            LlamaConfig(rope_parameters={**YARN, "factr": 1})
            assert "Unrecognized keys" in caplog.text and "factr" in caplog.text
    finally:
        theirs.disable_propagation()


def test_a_tokenizer_that_splits_at_random_or_wrongly(plain, tmp_path):
    model = json.loads((plain / "tokenizer.json").read_text())["model"]
    [line] = found(plain, tmp_path, "tokenizer.json", model={**model, "dropout": 0.1})
    assert line.startswith("tokenizer.json: dropout is 0.1: every text is split at random")


def mistral(
    directory: Path, pattern: str, version: str = "4.57.1", **settings: object
) -> list[str]:
    """What is told of the tokenizer of a large vocabulary that splits by a pattern."""
    splits = {"type": "Split", "pattern": {"Regex": pattern}}
    vocab = {str(number): number for number in range(100_001)}
    files = {
        "config.json": {"model_type": "mistral3", "transformers_version": version},
        "tokenizer.json": {"model": {"vocab": vocab}, "pre_tokenizer": splits},
        "tokenizer_config.json": settings,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return list(_of_tokenizer(directory))


def test_the_wrong_pattern_of_mistrals_tokenizers_is_told_once_it_matters(tmp_path):
    [line] = mistral(tmp_path, r"\p{L}+")
    assert 'put "fix_mistral_regex": true into tokenizer_config.json' in line
    assert mistral(tmp_path, r"\p{L}+", "5.1.0") == []
    assert mistral(tmp_path, r"\p{L}+", fix_mistral_regex=True) == []
    assert mistral(tmp_path, r"[\p{Lu}\p{Lt}]*[\p{Ll}]+") == []
