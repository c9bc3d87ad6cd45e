"""Every family goes the whole way, and stock libraries agree with what our own path computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.recovery_chain import (
    IDS,
    SILENT,
    adapted,
    check_recovery,
    check_training_and_recovery,
    close,
    keep_of,
    logits,
    recovered_and_merged,
)
from helpers.variants import DISTINCT, VARIANTS, Variant

from loram_cli.errors import UsageError
from loram_cli.modeling.chunked_loss import chunked_loss
from loram_cli.modeling.load import load_causal_lm
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.train import stage as train

pytestmark = pytest.mark.integration

STRATEGIES = ("rand", "l2", "taylor")
EVERY = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
# The slow tests send all variants the whole way, by every strategy.
PLAIN = pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.name in DISTINCT], ids=lambda v: v.name
)


def pruned(base: Path, out: Path, strategy: str, text: Path) -> None:
    how = {
        "rand": {"strategy": "rand"},
        "l2": {"strategy": "stru", "importance": "l2"},
        "taylor": {"strategy": "stru", "importance": "taylor", "calibration": str(text),
                   "calibration_samples": 2, "calibration_length": 24},
    }[strategy]  # fmt: skip
    spec = prune.PruneSpec(model=base, out=out, ratio=0.5, keep_first=1, keep_last=1, **how)
    prune.run(spec, SILENT)
    assert set(keep_of(out)) == {1, 2}


def check_the_whole_way(
    variant: Variant, strategy: str, run: Path, text: Path, instructions: Path
) -> None:
    base = variant.save(run / "base")
    pruned(base, run / "pruned", strategy, text)
    check_training_and_recovery(run, base, instructions)


@PLAIN
def test_ratio_0_is_the_base(variant: Variant, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = variant.save(tmp_path / "base")
    spec = prune.PruneSpec(
        model=base, out=tmp_path / "pruned", ratio=0.5, keep_first=0, keep_last=0, strategy="rand"
    )
    # A command refuses a ratio that drops nothing; below it there is no reason to.
    object.__setattr__(spec, "ratio", 0.0)
    prune.run(spec, SILENT)
    stock = AutoModelForCausalLM.from_pretrained(base).eval()
    close(logits(load_causal_lm(tmp_path / "pruned", device="cpu")), logits(stock))


@PLAIN
def test_the_whole_way_with_stock_libraries(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    strategy = STRATEGIES[DISTINCT.index(variant.name) % len(STRATEGIES)]
    check_the_whole_way(variant, strategy, tmp_path, text_file, instructions)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_whole_way_with_every_strategy(
    variant: Variant, strategy: str, text_file: Path, instructions: Path, tmp_path: Path
):
    check_the_whole_way(variant, strategy, tmp_path, text_file, instructions)


@pytest.mark.slow
@EVERY
def test_reconstructed_layers_are_nearer_and_recover(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", "l2", text_file)
    spec = align.AlignSpec(
        source=tmp_path / "pruned", out=tmp_path / "aligned", data=str(text_file), model=base,
        method=("reconstruct",), block_length=32, calibration_samples=16, ridge=0.1, device="cpu",
    )  # fmt: skip
    errors = align.run(spec, SILENT).manifest.results["layer_errors"]
    assert set(errors) == {"1", "2"}
    # Five digits are kept: a tiny layer may round to no error at all.
    assert all(after <= before for before, after in errors.values()), errors
    assert any(after < before for before, after in errors.values()), errors
    adapted(tmp_path / "aligned", tmp_path / "adapter", instructions)
    check_recovery(tmp_path, base)


@pytest.mark.slow
@EVERY
def test_the_loss_in_chunks_is_the_models_own(variant: Variant, tmp_path: Path):
    model = load_causal_lm(variant.save(tmp_path / "base"), device="cpu")
    labels = IDS.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        own = model(input_ids=IDS, labels=labels).loss
        with chunked_loss(model, chunk=7):
            torch.testing.assert_close(model(input_ids=IDS, labels=labels).loss, own)


@pytest.mark.slow
@EVERY
def test_alignment_keeps_every_tensor_and_decoding_uses_the_cache(
    variant: Variant, text_file: Path, tmp_path: Path
):
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", "rand", text_file)
    spec = align.AlignSpec(
        source=tmp_path / "pruned", out=tmp_path / "aligned", data=str(text_file), steps=2,
        batch=2, micro_batch=2, block_length=32, learning_rate=1e-3, device="cpu",
    )  # fmt: skip
    align.run(spec, SILENT)
    aligned = load_causal_lm(tmp_path / "aligned", device="cpu")
    before = logits(load_causal_lm(tmp_path / "pruned", device="cpu"))
    assert (logits(aligned) - before).abs().max() > 1e-4
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    texts = [aligned.generate(IDS[:, :12], use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({v.model_type for v in VARIANTS}))
def test_nf4_trains_and_recovers(
    model_type: str, text_file: Path, instructions: Path, tmp_path: Path
):
    variant = next(v for v in VARIANTS if v.model_type == model_type)
    base = variant.save(tmp_path / "base")
    pruned(base, tmp_path / "pruned", "rand", text_file)
    spec = train.TrainSpec(
        source=tmp_path / "pruned", out=tmp_path / "adapter", data=str(instructions), steps=1,
        batch=2, micro_batch=2, warmup_steps=0, max_length=48, eval_examples=2, device="cpu",
    )  # fmt: skip
    train.run(replace(spec, quantize="nf4"), SILENT)
    recovered_and_merged(tmp_path, base)


def pruned_otherwise(base: Path, out: Path, strategy: str, text: Path, **how: str) -> None:
    spec = prune.PruneSpec(
        model=base, out=out, strategy=strategy, ratio=0.5, keep_first=1, keep_last=1,
        calibration=str(text), calibration_samples=8, calibration_length=24, **how,
    )  # fmt: skip
    prune.run(spec, SILENT)


@pytest.mark.slow
@EVERY
def test_fewer_layers_load_in_stock_libraries_and_recover(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    base = variant.save(tmp_path / "base")
    try:
        pruned_otherwise(base, tmp_path / "pruned", "depth", text_file)
    except UsageError as error:
        assert "tells the kind of a layer by its place" in error.message
        return
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert stock.config.num_hidden_layers == 3
    close(logits(load_causal_lm(tmp_path / "pruned", device="cpu")), logits(stock))
    adapted(tmp_path / "pruned", tmp_path / "adapter", instructions)
    check_recovery(tmp_path, base)


@pytest.mark.slow
@EVERY
def test_linears_as_factors_train_and_recover(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    base = variant.save(tmp_path / "base")
    pruned_otherwise(base, tmp_path / "pruned", "lowrank", text_file)
    small = logits(load_causal_lm(tmp_path / "pruned", device="cpu"))
    assert small.isfinite().all()
    assert not torch.equal(small, logits(load_causal_lm(base, device="cpu")))
    adapted(tmp_path / "pruned", tmp_path / "adapter", instructions)
    check_recovery(tmp_path, base)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("importance", ["obs", "wanda"])
def test_groups_ranked_by_activations_recover(
    variant: Variant, importance: str, text_file: Path, instructions: Path, tmp_path: Path
):
    base = variant.save(tmp_path / "base")
    pruned_otherwise(base, tmp_path / "pruned", "stru", text_file, importance=importance)
    check_training_and_recovery(tmp_path, base, instructions)
