"""A method of alignment is one file and one line in the table: the example of contributing.md."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loram_cli.cli.app import run_command
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.align.methods.method import Alignment, Method, Needs
from loram_cli.stages.align.methods.table import METHODS
from loram_cli.stages.core.results import MethodResult

NORM = "model.norm.weight"


def halve(work: Alignment, reporter) -> MethodResult:
    """Halve the last norm."""
    tensors = load_file(work.source.directory / "model.safetensors")
    tensors[NORM] = tensors[NORM] / 2
    save_file(tensors, work.out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work.source.directory / name, work.out / name)
    return MethodResult(method=work.method, tokens=len(work.train_rows))


TOY = Method(
    act=halve, needs=lambda spec, model, base: Needs(model.num_bytes, 0), takes_steps=False
)


@pytest.fixture
def words(run_copy, text_file):
    run = ["--run", str(run_copy), "--data", str(text_file), "--block-length", "32", "--force"]
    return lambda method, *more: ["align", "--method", method, *run, *more]


def test_a_toy_method_runs_alone_and_in_a_chain(monkeypatch, words, run_copy, capsys):
    assert run_command(words("halve")) == 2
    assert "unknown value 'halve'" in capsys.readouterr().err
    monkeypatch.setitem(METHODS, "halve", TOY)
    assert run_command(words("halve", "--dry-run")) == 0
    assert "would align" in capsys.readouterr().out
    assert run_command(words("halve")) == 0
    before = load_file(run_copy / "pruned" / "model.safetensors")
    after = load_file(run_copy / "aligned" / "model.safetensors")
    halved = after.pop(NORM)
    assert torch.equal(halved, before.pop(NORM) / 2)
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    manifest = Manifest.read(run_copy / "aligned")
    assert manifest.results["method"] == ["halve"]
    assert manifest.results["tokens"] > 0
    chain = words("halve,pretrain", "--steps", "2", "--batch", "4", "--learning-rate", "1e-9")
    assert run_command(chain) == 0
    trained = load_file(run_copy / "aligned" / "model.safetensors")
    assert torch.allclose(trained[NORM], halved, atol=1e-5)
    assert [done["method"] for done in Manifest.read(run_copy / "aligned").results["chain"]] == [
        "halve",
        "pretrain",
    ]
