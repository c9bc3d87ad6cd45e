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
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
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


def test_taylor_is_the_gradient_by_a_gate_on_each_expert(tmp_path: Path):
    from loram_cli.modeling.layerwise.expert_scores import expert_taylor
    from loram_cli.modeling.layerwise.states import BoundaryPool
    from loram_cli.modeling.layerwise.stream import LayerStream

    model = Model.open(MIXTRAL.save(tmp_path / "base"))
    windows = torch.randint(2, 258, (3, 24), generator=torch.Generator().manual_seed(0))
    with (
        LayerStream(model, "cpu") as stream,
        BoundaryPool((3, 24, 32), stream.dtype, 2**30, tmp_path / "pool") as pool,
    ):
        experts = model.family.experts
        scores = expert_taylor(stream, experts, windows, [1, 2, 3], pool, SILENT)
    assert sorted(scores) == [1, 2, 3]
    # An expert ends in a linear: its weights times their gradients sum up to its gate's gradient.
    whole = load_causal_lm(model.directory, device="cpu")
    expected = {i: torch.zeros(6, dtype=torch.float64) for i in scores}
    for window in windows:
        whole.requires_grad_(True).zero_grad()
        whole(input_ids=window[None], labels=window[None]).loss.backward()
        for i, total in expected.items():
            down = whole.model.layers[i].mlp.experts.down_proj
            total += (down.double() * down.grad.double()).sum((1, 2)).abs().detach() / 9
    for i, score in scores.items():
        torch.testing.assert_close(score, expected[i], rtol=1e-3, atol=1e-9)


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


def test_latent_attention_has_no_heads_to_drop(tmp_path: Path):
    base = next(v for v in VARIANTS if v.name == "deepseek_v3").save(tmp_path / "base")
    spec = prune.PruneSpec(
        model=base, out=tmp_path / "out", strategy="rand", ratio=0.5, keep_first=2, keep_last=1
    )
    with pytest.raises(UsageError, match=r"drops nothing: .* no heads and no channels") as error:
        prune.run(spec, SILENT)
    assert "--experts-ratio" in error.value.hint


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
    if how == "global" and variant.changes.get("n_group", 1) > 1:
        pytest.skip("a router in groups keeps as many of each")
    # From the first layer on: latent attention leaves only the channels of dense layers.
    heads = {"ratio": 0.5, "keep_first": 0, "keep_last": 1}
    settings = {
        "rand": {"strategy": "rand"}, "reap": by_text(text_file),
        "both": {"strategy": "rand", **heads},
        "taylor": {**heads, **by_text(text_file), "importance": "taylor",
                   "experts_importance": "taylor"},
        "global": {"scope": "global", **by_text(text_file)},
    }[how]  # fmt: skip
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", **settings)
    check_training_and_recovery(tmp_path, base, instructions)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("strategy", ["semi", "unst", "lowbit"])
def test_strategies_that_leave_experts_whole_recover(
    variant: Variant, strategy: str, text_file: Path, instructions: Path, tmp_path: Path
):
    """Depth, low rank, obs and wanda go through ``test_family_chain.py``, mixtures among them."""
    base = variant.save(tmp_path / "base")
    how = {"bits": 4, "group_size": 8} if strategy == "lowbit" else {"ratio": 0.5}
    spec = prune.PruneSpec(
        model=base, out=tmp_path / "pruned", strategy=strategy, device="cpu", dampening=0.1,
        **by_text(text_file), **how,
    )  # fmt: skip
    prune.run(spec, SILENT)
    mine, whole = (Model.open(tmp_path / name) for name in ("pruned", "base"))
    names = set(whole.family.expert_names(whole.config))
    with TensorReader(mine.index) as reader, TensorReader(whole.index) as other:
        assert names and all(torch.equal(reader.read(n), other.read(n)) for n in names)
    adapted(tmp_path / "pruned", tmp_path / "adapter", instructions)
    check_recovery(tmp_path, base)


@pytest.mark.slow
@EVERY
def test_factors_on_experts_recover_by_index(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", **by_text(text_file))
    check_training_and_recovery(tmp_path, base, instructions, ("o_proj", "experts"))


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
    # Where no token reaches what went, there is nothing to make up for, and the fit rounds.
    assert all(after <= max(before, 1e-12) for before, after in errors.values()), errors
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


@pytest.mark.slow
def test_experts_in_mxfp4_go_the_whole_way(text_file: Path, instructions: Path, tmp_path: Path):
    from helpers.mxfp4_files import save_twins
    from safetensors.torch import load_file

    packed, plain = save_twins(tmp_path)
    close(*(logits(load_causal_lm(base, device="cpu")) for base in (packed, plain)))
    for base, out in ((packed, "pruned"), (plain, "other")):
        pruned(base, tmp_path / out, **by_text(text_file))
    mine, other = (load_file(tmp_path / n / "model.safetensors") for n in ("pruned", "other"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert "quantization_config" not in (tmp_path / "pruned" / "config.json").read_text()
    # The recovered adapter on the hub's own files: transformers expands them by itself.
    check_training_and_recovery(tmp_path, packed, instructions, ("q_proj", "experts"))
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "mxfp4"])
@pytest.mark.parametrize("importance", ["reap", "taylor", "rand"])
def test_pruning_holds_no_more_than_the_experts_of_two_layers(
    importance: str, packed: bool, text_file: Path, tmp_path: Path
):
    import subprocess
    import sys

    from helpers.mxfp4_files import save_large

    from loram_cli.runs.manifest import Manifest

    def held(name: str) -> int:
        command = [
            sys.executable, "-m", "loram_cli", "prune", "--model", f"{name}/base", "--out",
            f"{name}/pruned", "--experts-ratio", "0.5", "--experts-importance", importance,
            "--calibration", str(text_file), "--calibration-samples", "4",
            "--calibration-length", "24", "--device", "cpu",
        ]  # fmt: skip
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return Manifest.read(tmp_path / name / "pruned").peak_memory_increase_bytes

    layer_bytes = save_large(tmp_path / "large" / "base", packed=packed)
    assert layer_bytes == 96 * 2**20
    little_bytes = save_large(tmp_path / "small" / "base", packed=packed, width=64)
    # Beside a small one: libraries that a stage imports take as much for both.
    assert held("large") - held("small") < 2 * (layer_bytes - little_bytes)
