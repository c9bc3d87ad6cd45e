"""Mixtures of experts: dropped by whole experts, trained, and recovered by expert index."""

import json
from pathlib import Path

import pytest
import torch
from helpers.recovery_chain import (
    SILENT,
    adapted,
    check_recovery,
    check_training_and_recovery,
    close,
    keep_of,
    logits,
)
from helpers.variants import VARIANTS, Variant

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.errors import UsageError
from loram_cli.modeling.load import load_causal_lm
from loram_cli.pruning.experts import experts_left, keep_experts
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.train import stage as train

pytestmark = pytest.mark.integration

MIXTURES = [v for v in VARIANTS if family_for({"model_type": v.model_type}, "").experts]
EVERY = pytest.mark.parametrize("variant", MIXTURES, ids=lambda v: v.name)
MIXTRAL = next(v for v in MIXTURES if v.name == "mixtral")
GROUPS = next(v for v in MIXTURES if v.name == "glm4_moe-groups")
HALF = {"experts_ratio": 0.5, "device": "cpu"}


def pruned(base: Path, out: Path, **how) -> dict[str, tuple[int, ...]]:
    done = prune.run(prune.PruneSpec(model=base, out=out, **{**HALF, **how}), SILENT)
    return done.manifest.results["experts"]


def by_text(text: Path) -> dict:
    return {"calibration": str(text), "calibration_samples": 4, "calibration_length": 24}


def test_half_of_the_experts_go_and_stock_transformers_loads_the_rest(tmp_path: Path):
    import transformers

    base = MIXTRAL.save(tmp_path / "base")
    left = pruned(base, tmp_path / "pruned", strategy="rand")
    assert left == {str(i): [3, 6] for i in range(4)}
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["num_local_experts"], "per_layer_config" in config) == (3, False)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    close(logits(stock), logits(load_causal_lm(tmp_path / "pruned", device="cpu")))
    # Hub names, numbered anew.
    names = {n for f in (tmp_path / "pruned").glob("*.safetensors") for n in _names(f)}
    assert "model.layers.3.block_sparse_moe.experts.2.w1.weight" in names
    assert "model.layers.3.block_sparse_moe.experts.3.w1.weight" not in names


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def test_the_most_used_experts_stay(text_file: Path, tmp_path: Path):
    base = MIXTRAL.save(tmp_path / "base")
    how = {"experts_importance": "frequency", **by_text(text_file)}
    pruned(base, tmp_path / "pruned", **how)
    keep = keep_of(tmp_path / "pruned")
    # Route by hand what the first layer's router sees.
    model = load_causal_lm(base, device="cpu")
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    from loram_cli.modeling.load import load_tokenizer
    from loram_cli.pruning.calibrate import calibration_windows
    from loram_cli.training.data.documents import load_text

    windows = calibration_windows(load_text(str(text_file)), load_tokenizer(base), 4, 24, 42)
    with torch.no_grad():
        model(input_ids=windows)
    counts = torch.bincount(torch.cat(seen).flatten(), minlength=6)
    assert keep[0].experts == tuple(
        sorted(counts.sort(descending=True, stable=True)[1][:3].tolist())
    )


def test_every_group_of_a_router_keeps_as_many():
    from loram_cli.arch.spec import LayerGeometry

    layer = LayerGeometry(4, 2, 8, 24, num_experts=8, has_experts=True, expert_groups=2)
    scores = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    assert experts_left(layer, 0.5) == 4
    assert keep_experts(layer, scores, 4) == (0, 1, 4, 5)
    with pytest.raises(UsageError, match="2 groups, and the router needs 2"):
        experts_left(layer, 0.8)


def test_a_token_has_no_more_experts_than_stay(tmp_path: Path):
    base = MIXTRAL.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", strategy="rand", experts_ratio=0.8)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    pruned(base, tmp_path / "one", strategy="rand", experts_ratio=0.84)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (1, 1)


def test_a_dense_model_has_no_experts_to_drop(tmp_path: Path):
    base = next(v for v in VARIANTS if v.name == "llama2").save(tmp_path / "base")
    with pytest.raises(UsageError, match="family llama have no experts"):
        pruned(base, tmp_path / "pruned", strategy="rand")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "no --calibration is given"),
        ({"experts_ratio": None, "experts_importance": "rand", "strategy": "rand"}, "none go"),
        ({"strategy": "semi"}, "shapes and memory stay"),
        ({"strategy": "rand", "target_params": 10}, "goes without --experts-ratio"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, said: str, tmp_path: Path):
    with pytest.raises(UsageError, match=said):
        prune.PruneSpec(model=tmp_path, out=tmp_path / "out", **{**HALF, **settings})


def test_a_missing_expert_is_named(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    from loram_cli.errors import LoramError

    base = MIXTRAL.save(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoramError, match=r"experts\.2\.w3\.weight is missing"):
        CheckpointIndex.open(base)


def test_attention_factors_recover_as_they_are(text_file: Path, instructions: Path, tmp_path: Path):
    base = MIXTRAL.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", **by_text(text_file))
    check_training_and_recovery(tmp_path, base, instructions)
    from loram_cli.runs.manifest import Manifest

    assert Manifest.read(tmp_path / "recovered").results["unchanged"] is True


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("how", ["rand", "reap", "both", "global", "taylor"])
def test_the_whole_way(
    variant: Variant, how: str, text_file: Path, instructions: Path, tmp_path: Path
):
    if how == "global" and variant is GROUPS:
        pytest.skip("a router in groups keeps as many of each")
    heads = {"ratio": 0.5, "keep_first": 1, "keep_last": 1}
    settings = {
        "rand": {"strategy": "rand"}, "reap": by_text(text_file),
        "both": {"strategy": "rand", **heads}, "taylor": {**heads, **by_text(text_file)},
        "global": {"scope": "global", **by_text(text_file)},
    }[how]  # fmt: skip
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", **settings)
    check_training_and_recovery(tmp_path, base, instructions)


@pytest.mark.slow
@EVERY
def test_factors_on_experts_recover_by_index(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", **by_text(text_file))
    check_training_and_recovery(tmp_path, base, instructions, ("q_proj", "experts"))


@pytest.mark.slow
@EVERY
def test_layers_without_some_experts_are_fitted_and_recover(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    base = variant.save(tmp_path / "base")
    # Drawn: of random models, some send every token to the same few experts, which would stay.
    pruned(base, tmp_path / "pruned", strategy="rand")
    spec = align.AlignSpec(
        source=tmp_path / "pruned", out=tmp_path / "aligned", data=str(text_file), model=base,
        method=("reconstruct", "pretrain", "distill"), steps=2, batch=2, micro_batch=2,
        block_length=32, calibration_samples=16, ridge=0.1, device="cpu",
    )  # fmt: skip
    first = align.run(spec, SILENT).manifest.results["chain"][0]
    errors = first["layer_errors"]
    assert all(after <= before for before, after in errors.values()), errors
    assert sum(after < before for before, after in errors.values()) >= len(errors) - 1, errors
    adapted(tmp_path / "aligned", tmp_path / "adapter", instructions)
    check_recovery(tmp_path, base)


@pytest.mark.slow
@EVERY
def test_experts_in_nf4_train(variant: Variant, instructions: Path, tmp_path: Path):
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", strategy="rand")
    spec = train.TrainSpec(
        source=tmp_path / "pruned", out=tmp_path / "adapter", data=str(instructions), steps=1,
        batch=2, micro_batch=2, warmup_steps=0, max_length=48, eval_examples=2, device="cpu",
        quantize="nf4",
    )  # fmt: skip
    assert train.run(spec, SILENT).manifest.results["eval_loss_after"] is not None
