"""Linears as two factors: written, trained on as such, and the adapter is the full model's."""

import json

import pytest
import torch
from helpers.slow import slow

from loram_cli.errors import UsageError
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.low_rank import LowRankLinear
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train

SILENT = NullReporter()
SMALL = {"steps": 1, "batch": 2, "micro_batch": 2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def factored(base, instructions, tmp_path_factory):
    """A base whose two middle layers hold their linears as factors."""
    out = tmp_path_factory.mktemp("lowrank") / "pruned"
    spec = prune.PruneSpec(
        model=base, out=out, strategy="lowrank", ratio=0.5, keep_first=1, keep_last=1,
        calibration=str(instructions), calibration_samples=8, calibration_length=32,
    )  # fmt: skip
    prune.run(spec, SILENT)
    return out


def training(source, out, instructions, **more):
    return train.TrainSpec(
        source=source, out=out, data=str(instructions), max_length=64, learning_rate=1e-2,
        eval_examples=0, dropout=0.0, **SMALL, **more,
    )  # fmt: skip


def test_factors_are_smaller_and_near_the_base(base, factored):
    config = json.loads((factored / "config.json").read_text())
    assert set(config["low_rank"]) == {"1", "2"}
    small, full = load_causal_lm(factored), load_causal_lm(base)
    linear = small.model.layers[1].mlp.up_proj
    assert isinstance(linear, LowRankLinear)
    assert not isinstance(small.model.layers[0].mlp.up_proj, LowRankLinear)
    whole = full.model.layers[1].mlp.up_proj.weight
    product = linear.second.weight @ linear.first.weight
    assert product.shape == whole.shape
    assert 0 < (product - whole).norm() < whole.norm()
    results = Manifest.read(factored).results
    assert results["pruned_params"] == sum(p.numel() for p in small.parameters())
    assert results["pruned_params"] < results["base_params"]


@pytest.mark.parametrize("more", [slow({}), {"quantize": "nf4"}, slow({"stream": True})], ids=str)
def test_recovery_is_the_identity(base, factored, instructions, tmp_path, more):
    train.run(training(factored, tmp_path / "adapter", instructions, **more), SILENT)
    spec = recover.RecoverSpec(adapter=tmp_path / "adapter", model=base, out=tmp_path / "recovered")
    recover.run(spec, SILENT)
    small, full = (LoraAdapter.read(tmp_path / name) for name in ("adapter", "recovered"))
    assert small.pairs.keys() == full.pairs.keys()
    for name, pair in small.pairs.items():
        assert torch.equal(pair.lora_a, full.pairs[name].lora_a)
        assert torch.equal(pair.lora_b, full.pairs[name].lora_b)
    assert full.pairs["model.layers.1.mlp.up_proj"].lora_b.any()


def test_factors_are_aligned_by_distillation(base, factored, instructions, tmp_path):
    settings = {"data": str(instructions), "block_length": 32, "eval_rows": 0, **SMALL}
    spec = align.AlignSpec(
        source=factored, out=tmp_path / "aligned", method=("distill",), **settings
    )
    align.run(spec, SILENT)
    before, after = load_causal_lm(factored), load_causal_lm(tmp_path / "aligned")
    layer = after.model.layers[2].mlp.down_proj
    assert isinstance(layer, LowRankLinear)
    assert not torch.equal(layer.first.weight, before.model.layers[2].mlp.down_proj.first.weight)
    spec = align.AlignSpec(
        source=factored, out=tmp_path / "fit", method=("reconstruct",), **settings
    )
    with pytest.raises(UsageError, match="holds its linears as factors"):
        align.run(spec, SILENT)
