"""The factor on a recovered update: the search for it, and what it does."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.recovery_chain import SILENT
from helpers.reporters import WarningRecorder
from safetensors.torch import load_file

from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import WEIGHTS_NAME
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.recover.scale import best_scale
from loram_cli.stages.train import stage as train


@pytest.mark.parametrize("best", [0.3, 0.8, 1.2, 1.7, 2.6, 5.0])
def test_the_smallest_loss_is_found(best: float):
    scale, losses = best_scale(lambda scale: 1 + math.log(scale / best) ** 2)
    assert scale == pytest.approx(best, rel=0.02)
    assert losses[scale] == min(losses.values()) and 1.0 in losses
    assert len(losses) <= 9


def test_a_loss_that_scale_does_not_lower_leaves_the_update_as_it_is():
    assert best_scale(lambda scale: 2.0)[0] == 1.0
    assert best_scale(lambda scale: abs(math.log(scale)))[0] == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_search_ends_where_the_loss_always_falls(sign: int):
    tried = best_scale(lambda scale: sign * scale)[1]
    assert all(1 / 8 < scale < 8 for scale in tried) and len(tried) <= 9


def test_a_loss_that_is_not_finite_is_never_chosen():
    scale, losses = best_scale(lambda scale: math.nan if scale > 2 else 1 / scale)
    assert scale == pytest.approx(1.5) and losses[scale] == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def trained(base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a small model, whose training data lies beside it."""
    run = tmp_path_factory.mktemp("scaled")
    (run / "d.jsonl").write_text(instructions.read_text())
    prune.run(
        prune.PruneSpec(
            model=base, out=run / "pruned", ratio=0.5, strategy="rand", keep_first=1, keep_last=1
        ),
        SILENT,
    )
    spec = train.TrainSpec(
        source=run / "pruned", out=run / "adapter", data=str(run / "d.jsonl"), steps=3, batch=4,
        micro_batch=2, learning_rate=1e-2, warmup_steps=0, max_length=64, eval_examples=4,
    )  # fmt: skip
    train.run(spec, SILENT)
    return run


@pytest.mark.integration
def test_the_update_is_scaled_to_what_lowers_the_loss_most(base: Path, trained: Path, tmp_path):
    kept = {"adapter": trained / "adapter", "model": base}
    recover.run(recover.RecoverSpec(**kept, out=tmp_path / "plain"), SILENT)
    spec = recover.RecoverSpec(**kept, out=tmp_path / "out", fit_scale=True, scale_examples=8)
    result = recover.run(spec, SILENT).result
    losses = result.scale_losses
    assert losses[f"{result.scale:.4g}"] == min(losses.values()) < losses["1"]
    plain, scaled = (load_file(tmp_path / n / WEIGHTS_NAME) for n in ("plain", "out"))
    for name, tensor in plain.items():
        expected = tensor * result.scale if "lora_B" in name else tensor
        torch.testing.assert_close(scaled[name], expected)
    # The losses are those of stock PEFT on the same examples, and none that was held out is there.
    from loram_cli.modeling.load import load_causal_lm, load_tokenizer
    from loram_cli.schema import spec_from_mapping
    from loram_cli.stages.train.data import prepare, training_rows
    from loram_cli.training.adapters import load_adapter
    from loram_cli.training.loop.mean_loss import mean_loss

    made_by = spec_from_mapping(train.TrainSpec, Manifest.read(trained / "adapter").spec, "spec")
    tokenizer = load_tokenizer(base)
    rows = training_rows(made_by, tokenizer, 8, SILENT)
    assert len(rows) == 8
    held = {tuple(row.input_ids) for row in prepare(made_by, tokenizer, SILENT).eval_rows}
    assert held.isdisjoint(tuple(row.input_ids) for row in rows)
    stock = load_adapter(load_causal_lm(base), tmp_path / "out")
    assert mean_loss(stock, rows) == pytest.approx(losses[f"{result.scale:.4g}"], abs=2e-4)


@pytest.mark.integration
@pytest.mark.parametrize(("best", "told"), [(0.3, True), (0.9, False), (2.0, False)])
def test_an_update_that_is_far_too_large_is_told(base, trained, tmp_path, monkeypatch, best, told):
    from loram_cli.training.loop import mean_loss

    recorder = WarningRecorder()
    # By the factors that stock PEFT computes with.
    losses = lambda model, rows: abs(math.log(scaling(model) / 2 / best))  # noqa: E731
    monkeypatch.setattr(mean_loss, "mean_loss", losses)
    spec = recover.RecoverSpec(
        adapter=trained / "adapter", model=base, out=tmp_path / "out", fit_scale=True
    )
    assert recover.run(spec, recorder).result.scale == pytest.approx(best, rel=0.2)
    assert any("of its size" in line for line in recorder.warnings) == told


def scaling(model) -> float:
    layer = next(m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict))
    return layer.scaling["default"]


@pytest.mark.integration
def test_data_that_has_changed_is_refused(base: Path, trained: Path, tmp_path: Path):
    data = trained / "d.jsonl"
    kept = data.read_text()
    spec = recover.RecoverSpec(
        adapter=trained / "adapter", model=base, out=tmp_path / "out", fit_scale=True
    )
    try:
        data.write_text(kept + kept.splitlines()[0] + "\n")
        with pytest.raises(LoramError, match=r"d\.jsonl is not what the adapter was trained on"):
            recover.run(spec, SILENT)
        data.unlink()
        with pytest.raises(LoramError, match="--fit-scale: "):
            recover.plan(spec, SILENT)
    finally:
        data.write_text(kept)
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_other_objectives_are_refused(base: Path, trained: Path, tmp_path: Path):
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    manifest = Manifest.read(adapter)
    replace(
        manifest, spec=manifest.spec | {"objective": "orpo", "beta": 0.1, "dropout": 0.0}
    ).write(adapter)
    spec = recover.RecoverSpec(adapter=adapter, model=base, out=tmp_path / "out", fit_scale=True)
    with pytest.raises(UsageError, match="this adapter learnt by orpo"):
        recover.plan(spec, SILENT)
