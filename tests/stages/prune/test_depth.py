"""Whole layers: dropped by what they change, trained without, and put back at recovery."""

import json

import pytest
import torch
import transformers
from helpers.reporters import WarningRecorder

from loram_cli.arch.registry import family_for
from loram_cli.errors import UsageError
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.modeling.load import load_causal_lm
from loram_cli.pruning.depth import keep_influential, shorter_config, without_last
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.tools.specs import VerifySpec
from loram_cli.tools.verify import run as verify
from loram_cli.training.adapters import load_adapter

SILENT = NullReporter()


def test_the_layers_that_change_least_go():
    influence = {1: 0.4, 2: 0.1, 3: 0.3, 4: 0.1}
    assert keep_influential(influence, 2, 6) == (0, 1, 3, 5)
    assert keep_influential(influence, 1, 6) == (0, 1, 2, 3, 5)
    assert without_last(6, 0.5, 1, 1) == (0, 1, 2, 5)
    with pytest.raises(UsageError, match="less than one layer"):
        without_last(6, 0.1, 1, 1)


@pytest.mark.parametrize(
    ("model_type", "said", "kept", "expected"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2}, (0, 2, 3), {"first_k_dense_replace": 1}),
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}, (0, 1, 3), {"mlp_only_layers": [1, 2]}),
        (
            "ernie4_5_moe",
            {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1},
            (0, 2, 3),
            {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (0, 2, 3), None),
    ],
)
def test_places_of_layers_of_a_kind_are_counted_anew(model_type, said, kept, expected):
    config = {
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 24, "vocab_size": 64,
        "num_attention_heads": 4, "num_hidden_layers": 4, **said,
    }  # fmt: skip
    family = family_for(config, "test")
    if expected is None:
        with pytest.raises(UsageError, match="tells the kind of a layer by its place"):
            shorter_config(family, config, kept)
        return
    found = shorter_config(family, config, kept)
    assert {key: found[key] for key in expected} == expected
    before, after = (family.geometry(c).layers for c in (config, found))
    assert [layer.kind for layer in after] == [before[i].kind for i in kept]


@pytest.fixture(scope="module")
def depth_run(base, instructions, tmp_path_factory):
    """A run on a base of which one of two middle layers is dropped."""
    run = tmp_path_factory.mktemp("depth")
    spec = prune.PruneSpec(
        model=base, out=run / "pruned", strategy="depth", ratio=0.5, keep_first=1, keep_last=1,
        calibration=str(instructions), calibration_samples=4, calibration_length=16,
    )  # fmt: skip
    prune.run(spec, SILENT)
    small = {"steps": 1, "batch": 2, "micro_batch": 2, "warmup_steps": 0}
    aligning = align.AlignSpec(
        source=run / "pruned", out=run / "aligned", data=str(instructions), method=("distill",),
        block_length=32, eval_rows=0, **small,
    )  # fmt: skip
    align.run(aligning, SILENT)
    training = train.TrainSpec(
        source=run / "aligned", out=run / "adapter", data=str(instructions), max_length=64,
        learning_rate=1e-2, eval_examples=0, dropout=0.0, **small,
    )  # fmt: skip
    train.run(training, SILENT)
    recover.run(
        recover.RecoverSpec(adapter=run / "adapter", model=base, out=run / "recovered"), SILENT
    )
    return run


def test_what_is_left_is_an_ordinary_checkpoint(base, depth_run):
    kept = Manifest.read(depth_run / "pruned").keep["layers"]["kept"]
    assert len(kept) == 3 and kept[0] == 0 and kept[-1] == 3
    config = json.loads((depth_run / "pruned" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and "per_layer_config" not in config
    small = transformers.AutoModelForCausalLM.from_pretrained(depth_run / "pruned")
    full = load_causal_lm(base)
    for mine, index in zip(small.model.layers, kept, strict=True):
        theirs = full.model.layers[index]
        assert torch.equal(mine.mlp.down_proj.weight, theirs.mlp.down_proj.weight)
        assert torch.equal(mine.input_layernorm.weight, theirs.input_layernorm.weight)


def test_recovery_puts_factors_back_on_their_layers(base, depth_run):
    kept = Manifest.read(depth_run / "pruned").keep["layers"]["kept"]
    small, full = (LoraAdapter.read(depth_run / name) for name in ("adapter", "recovered"))
    (gone,) = set(range(4)) - set(kept)
    for j, i in enumerate(kept):
        mine = small.pairs[f"model.layers.{j}.self_attn.q_proj"]
        theirs = full.pairs[f"model.layers.{i}.self_attn.q_proj"]
        assert torch.equal(mine.lora_a, theirs.lora_a)
        assert torch.equal(mine.lora_b, theirs.lora_b) and mine.lora_b.any()
    # As PEFT starts: nothing changes, and exact steps may go on from there.
    fresh = full.pairs[f"model.layers.{gone}.mlp.up_proj"]
    assert fresh.lora_a.any() and not fresh.lora_b.any()
    model = load_adapter(load_causal_lm(base), depth_run / "recovered")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    report = verify(VerifySpec(directory=depth_run / "recovered"), WarningRecorder())
    assert not report.problems


def test_what_does_not_go_with_depth_is_said(base, depth_run, instructions, tmp_path):
    fit = align.AlignSpec(
        source=depth_run / "pruned", out=tmp_path / "fit", data=str(instructions),
        method=("reconstruct",),
    )  # fmt: skip
    with pytest.raises(UsageError, match="lacks whole layers"):
        align.run(fit, SILENT)
    with pytest.raises(UsageError, match="it drops whole layers"):
        prune.PruneSpec(
            model=base, out=tmp_path / "p", strategy="depth", calibration="x", scope="global"
        )
    with pytest.raises(UsageError, match="ranks by hidden states on text"):
        prune.PruneSpec(model=base, out=tmp_path / "p", strategy="depth")
