"""Families as inspect proposes them, read from a folder of the user's own: the whole way."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.recovery_chain import (
    SILENT,
    adapted,
    check_recovery,
    check_training_and_recovery,
    logits,
)
from helpers.tiny_models import save_tokenizer

from loram_cli.arch.registry import FAMILIES_VARIABLE, families, family_for
from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError
from loram_cli.modeling.load import load_causal_lm
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune

pytestmark = pytest.mark.integration

SMALL = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
         "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 0,
         "eos_token_id": 0}  # fmt: skip
# As if no file of ours knew them: a user's own comes first. Dropout would differ from run to run.
UNKNOWN = {
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32, "dropout": 0.0},
    "biogpt": {"intermediate_size": 24, "hidden_dropout_prob": 0.0, "activation_dropout": 0.0,
               "attention_probs_dropout_prob": 0.0},
}  # fmt: skip
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "opt" else pytest.mark.slow) for n in UNKNOWN]
)


def saved(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SMALL, **UNKNOWN[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.3
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture
def proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a base of a family, and has its file proposed and read."""

    def make(name: str) -> Path:
        base = saved(name, tmp_path / "base")
        file = tmp_path / "families" / f"{name}.json"
        assert run_command(["inspect", str(base), "--family", "--out", str(file)]) == 0
        monkeypatch.setenv(FAMILIES_VARIABLE, str(file.parent))
        return base

    return make


def pruned(base: Path, out: Path, strategy: str) -> None:
    how = {"strategy": "rand"} if strategy == "rand" else {"strategy": "stru", "importance": "l2"}
    prune.run(
        prune.PruneSpec(model=base, out=out, ratio=0.5, keep_first=1, keep_last=1, **how), SILENT
    )


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("strategy", ["stru", "rand"])
def test_a_proposed_family_goes_the_whole_way(
    name: str, strategy: str, proposed, text_file: Path, instructions: Path, tmp_path: Path
):
    base = proposed(name)
    pruned(base, tmp_path / "pruned", strategy)
    check_training_and_recovery(tmp_path, base, instructions)
    spec = align.AlignSpec(
        source=tmp_path / "pruned", out=tmp_path / "aligned", data=str(text_file), model=base,
        method=("reconstruct",), block_length=32, calibration_samples=16, ridge=0.1, device="cpu",
    )  # fmt: skip
    errors = align.run(spec, SILENT).manifest.results["layer_errors"]
    assert all(after <= before for before, after in errors.values()), errors
    for done in ("adapter", "recovered", "merged"):
        (tmp_path / done).rename(tmp_path / f"{done}-1")
    adapted(tmp_path / "aligned", tmp_path / "adapter", instructions)
    check_recovery(tmp_path, base)


@EVERY
def test_a_uniform_model_of_it_loads_anywhere(name: str, proposed, tmp_path: Path):
    base = proposed(name)
    spec = prune.PruneSpec(
        model=base, out=tmp_path / "pruned", ratio=0.5, uniform=True, strategy="rand",
        keep_first=1, keep_last=1,
    )  # fmt: skip
    prune.run(spec, SILENT)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(
        logits(stock), logits(load_causal_lm(tmp_path / "pruned", device="cpu"))
    )


def test_a_decoder_without_a_file_is_refused_with_the_way_to_one():
    for name in ("bloom", "codegen"):
        with pytest.raises(LoramError, match="is not a known family") as caught:
            family_for({"model_type": name}, "m")
        assert "loram inspect m --family --out families/NAME.json" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no family file"),
        ("{}", "no 'modules'"),
        ('{"modules": [], "model_type": "x"}', "unexpected keyword argument 'model_type'"),
    ],
)
def test_a_file_that_is_no_family_is_named(text, said, tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text(text)
    monkeypatch.setenv(FAMILIES_VARIABLE, str(tmp_path))
    with pytest.raises(LoramError, match=f"mine.json: is no family file.*{said}|{said}"):
        families()


def test_an_absent_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(FAMILIES_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(LoramError, match=r"LORAM_FAMILIES: .*gone is no folder"):
        families()


def test_a_file_of_the_users_own_comes_before_ours(tmp_path, monkeypatch):
    from loram_cli.arch import registry

    data = json.loads((Path(registry.__file__).parent / "families" / "llama.json").read_text())
    (tmp_path / "llama.json").write_text(json.dumps(data | {"family": "mine"}))
    monkeypatch.setenv(FAMILIES_VARIABLE, str(tmp_path))
    assert family_for({"model_type": "llama"}, "m").family == "mine"


def test_a_proposal_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = ["inspect", str(tmp_path), "--out", str(tmp_path / "config.json")]
    assert run_command(words) == 2
    assert "--out goes with --family" in capsys.readouterr().err
    assert run_command([*words, "--family"]) == 2
    assert "config.json is there already" in capsys.readouterr().err
