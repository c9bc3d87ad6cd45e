"""NaN in a model or an adapter ends every command that uses it, in one line that names it."""

import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from loram_cli.cli.app import run_command

WEIGHT = "model.layers.2.mlp.down_proj.weight"
RESIDENT, STREAMED, NF4 = [], ["--weights-memory", "2MiB"], ["--quantize", "nf4"]


def spoilt(source, target, name, file="model.safetensors"):
    """A copy with one NaN, and without the record that would tell that it was changed."""
    shutil.copytree(source, target)
    (target / "loram.json").unlink(missing_ok=True)
    tensors = load_file(target / file)
    tensors[name].view(-1)[5] = math.nan
    save_file(tensors, target / file, metadata={"format": "pt"})
    return target


def refused(capsys, file, name, words):
    assert run_command([*map(str, words)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: {file}: tensor {name} has NaN or infinite values"]


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    return spoilt(base, tmp_path_factory.mktemp("model") / "base", WEIGHT)


@pytest.mark.parametrize("way", [RESIDENT, STREAMED, NF4], ids=["resident", "streamed", "nf4"])
def test_a_model_that_is_asked(model, capsys, monkeypatch, way):
    monkeypatch.setenv("COLUMNS", "400")
    words = ["generate", "a", "--row", f"x={model}", "--rows", "", "--device", "cpu", *way]
    refused(capsys, model / "model.safetensors", WEIGHT, words)


@pytest.mark.parametrize("way", [RESIDENT, NF4], ids=["plain", "nf4"])
def test_a_model_that_is_trained_on(model, instructions, capsys, monkeypatch, way):
    monkeypatch.setenv("COLUMNS", "400")
    words = ["train", "--in", model, "--data", instructions, "--steps", "1", "--device", "cpu"]
    refused(capsys, model / "model.safetensors", WEIGHT, [*words, "--out", "out", *way])


def test_an_adapter(base, finished_run, instructions, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    file = "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    adapter = spoilt(finished_run / "recovered", tmp_path / "recovered", name, file)
    words = ["generate", "a", "--row", f"x={base}+{adapter}", "--rows", "", "--device", "cpu"]
    refused(capsys, adapter / file, name, words)
