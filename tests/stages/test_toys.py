"""A strategy and a family of somebody else's, added as contributing.md says, go the whole way."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from loram_cli.arch import registry
from loram_cli.cli.app import run_command
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.strategies import STRATEGIES
from loram_cli.pruning.strategy import LayerToPrune, Strategy
from loram_cli.runs.manifest import Manifest

TRAIN = ["--steps", 1, "--batch", 4, "--warmup-steps", 0, "--max-length", 64]


def loram(*words: object) -> int:
    return run_command([str(word) for word in words])


def keep_first_groups(layer: LayerToPrune) -> LayerKeep:
    return LayerKeep(
        tuple(range(layer.after.num_key_value_heads)), tuple(range(layer.after.intermediate_size))
    )


@pytest.fixture
def toy_family(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of model_type ``toy``: a Llama by another name, as a family file of the user's own."""

    class ToyConfig(transformers.LlamaConfig):
        model_type = "toy"

    transformers.AutoConfig.register("toy", ToyConfig, exist_ok=True)
    data = json.loads((Path(registry.__file__).parent / "families" / "llama.json").read_text())
    data |= {"family": "toy", "model_types": ["toy"]}
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps(data))
    monkeypatch.setenv(registry.FAMILIES_VARIABLE, str(folder))
    model = shutil.copytree(base, tmp_path / "base")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "toy"}))
    return model


def recovered(run: Path, instructions: Path) -> LoraAdapter:
    assert loram("train", "--run", run, "--data", instructions, *TRAIN) == 0
    assert loram("recover", "--run", run, "--merge") == 0
    return LoraAdapter.read(run / "recovered")


def test_a_toy_strategy(base, instructions, tmp_path, monkeypatch, capsys):
    toy = Strategy(summary="the first groups", ratio=0.5, paper_ratios=(), keep=keep_first_groups)
    monkeypatch.setitem(STRATEGIES, "first", toy)
    kept = ["--keep-first", 1, "--keep-last", 1]
    run = tmp_path / "run"
    assert loram("prune", "--model", base, "--run", run, "--strategy", "first", *kept) == 0
    manifest = Manifest.read(run / "pruned")
    assert manifest.spec["ratio"] == 0.5
    half = {"key_value_heads": [0, 1], "intermediate": list(range(20))}
    assert dict(manifest.keep) == {"1": half, "2": half}
    adapter = recovered(run, instructions)
    up = adapter.pairs["model.layers.1.mlp.up_proj"].lora_b
    assert up.shape[0] == 40 and not up[20:].any()
    capsys.readouterr()
    words = ["prune", "--model", base, "--run", tmp_path / "other", "--strategy", "first", *kept]
    assert loram(*words, "--importance", "l2") == 2
    assert "none: groups are drawn" in capsys.readouterr().err


def test_a_toy_family(toy_family, instructions, tmp_path):
    run = tmp_path / "run"
    words = ["--strategy", "rand", "--ratio", 0.5, "--keep-first", 1, "--keep-last", 1]
    assert loram("prune", "--model", toy_family, "--run", run, *words) == 0
    adapter = recovered(run, instructions)
    assert adapter.pairs["model.layers.1.mlp.up_proj"].lora_b.shape[0] == 40
    assert json.loads((run / "merged" / "config.json").read_text())["model_type"] == "toy"
