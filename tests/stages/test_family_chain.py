"""Every family goes the whole way, and stock libraries agree with what our own path computes."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from variants import VARIANTS, Variant

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.modeling.narrow import load_causal_lm
from loram_cli.pruning.groups import LayerKeep
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages import align, merge, prune, recover, train
from loram_cli.training.adapters import load_adapter

SILENT = NullReporter()
# Longer than the sliding windows of the variants, and two rows that differ.
IDS = torch.arange(2, 50).reshape(2, 24)
STRATEGIES = ("rand", "l2", "taylor")
EVERY = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def pruned(base: Path, out: Path, strategy: str, text: Path) -> dict[int, LayerKeep]:
    how = {
        "rand": {"strategy": "rand"},
        "l2": {"strategy": "stru", "importance": "l2"},
        "taylor": {"strategy": "stru", "calibration": str(text), "calibration_samples": 2,
                   "calibration_length": 24},
    }[strategy]  # fmt: skip
    spec = prune.PruneSpec(model=base, out=out, ratio=0.5, keep_first=1, keep_last=1, **how)
    prune.run(spec, SILENT)
    return {int(i): LayerKeep.from_mapping(k) for i, k in Manifest.read(out).keep.items()}


def base_with_groups_zeroed(base: Path, keep: dict[int, LayerKeep]):
    """The base, where nothing reads what the dropped heads and channels compute."""
    model = load_causal_lm(base, device="cpu")
    config = read_config(base)
    family = family_for(config, "base")
    geometry = family.geometry(config)
    for i, kept in keep.items():
        for module in family.modules:
            columns = kept.columns(module, geometry.layers[i])
            if columns is not None:
                weight = model.get_parameter(f"{family.layer_prefix(i)}{module.name}.weight")
                dropped = sorted(set(range(weight.shape[1])) - set(columns))
                assert dropped
                weight.data[:, dropped] = 0
    return model


def adapted(source: Path, out: Path, instructions: Path) -> None:
    spec = train.TrainSpec(
        source=source, out=out, data=str(instructions), steps=2, batch=2, micro_batch=2,
        learning_rate=2e-2, warmup_steps=0, max_length=48, eval_examples=2, eval_steps=2,
        device="cpu",
    )  # fmt: skip
    train.run(spec, SILENT)


def recovered_and_merged(run: Path, base: Path) -> None:
    places = {"adapter": run / "adapter", "model": base, "out": run / "recovered"}
    recover.run(recover.RecoverSpec(**places), SILENT)
    places = {"adapter": run / "recovered", "model": base, "out": run / "merged"}
    merge.run(merge.MergeSpec(**places), SILENT)


def check_the_whole_way(
    variant: Variant, strategy: str, run: Path, text: Path, instructions: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = variant.save(run / "base")
    keep = pruned(base, run / "pruned", strategy, text)
    assert set(keep) == {1, 2}
    narrow = load_causal_lm(run / "pruned", device="cpu")
    close(logits(narrow), logits(base_with_groups_zeroed(base, keep)))

    adapted(run / "pruned", run / "adapter", instructions)
    recovered_and_merged(run, base)
    plain = logits(AutoModelForCausalLM.from_pretrained(base).eval())
    close(plain, logits(load_causal_lm(base, device="cpu")))
    stock = AutoModelForCausalLM.from_pretrained(base)
    stock = logits(PeftModel.from_pretrained(stock, run / "recovered").eval())
    assert (stock - plain).abs().max() > 1e-3
    close(logits(AutoModelForCausalLM.from_pretrained(run / "merged").eval()), stock)
    close(logits(load_adapter(load_causal_lm(base, device="cpu"), run / "recovered")), stock)
    # Where only kept groups are read, the recovered adapter does what the small one does.
    small = logits(load_adapter(narrow, run / "adapter"))
    full = load_adapter(base_with_groups_zeroed(base, keep), run / "recovered")
    close(small, logits(full))


@EVERY
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


@EVERY
def test_the_whole_way_with_stock_libraries(
    variant: Variant, text_file: Path, instructions: Path, tmp_path: Path
):
    strategy = STRATEGIES[VARIANTS.index(variant) % len(STRATEGIES)]
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
