"""How long training goes, which of its checkpoints is the output, and recovering any of them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.reporting import NullReporter
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.training.curves import read_curve_csv

SILENT = NullReporter()
SMALL = {
    "batch": 4, "micro_batch": 2, "max_length": 64, "eval_examples": 4, "device": "cpu",
    "learning_rate": 1e-2,
}  # fmt: skip


def spec_of(run: Path, instructions: Path, out: Path, **changes) -> train.TrainSpec:
    return train.TrainSpec(
        source=run / "pruned", out=out, data=str(instructions), **{**SMALL, **changes}
    )


def weights(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def test_without_steps_it_runs_epochs(finished_run, instructions, tmp_path):
    plans = {
        name: train.plan(
            spec_of(finished_run, instructions, tmp_path / "x", **changes), SILENT, count=True
        ).figures
        for name, changes in (("default", {}), ("half", {"epochs": 0.5}), ("steps", {"steps": 7}))
    }
    examples = plans["default"]["examples"]
    assert plans["default"]["steps"] == -(-3 * examples // 4)
    assert plans["half"]["steps"] == -(-examples // 8)
    assert plans["steps"]["steps"] == 7
    assert plans["steps"]["tokens_per_pass"] <= 2 * 64
    settled = spec_of(finished_run, instructions, tmp_path / "x").settled()
    assert (settled.epochs, settled.steps) == (3.0, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 4, "epochs": 2.0}, "both say how long"),
        ({"eval_examples": 0, "early_stopping": 2}, "--early-stopping needs held-out data"),
        ({"eval_examples": 0, "score_recovered": True}, "--score-recovered needs held-out data"),
        ({"objective": "dpo", "packing": "on"}, "--packing on does not go with --objective dpo"),
        ({"objective": "dpo", "score_recovered": True}, "--score-recovered does not go with"),
    ],
)
def test_settings_that_do_not_go_together(finished_run, instructions, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        spec_of(finished_run, instructions, tmp_path / "x", **changes)


def test_checkpoints_are_kept_and_recovered(finished_run, instructions, tmp_path, base, capsys):
    # A rate at which the model unlearns: the first checkpoint stays the best.
    spec = spec_of(
        finished_run, instructions, tmp_path / "adapter",
        steps=4, save_steps=2, eval_steps=2, learning_rate=3.0, score_recovered=True,
        keep="last", targets=("all-linear",), rslora=True, rank=4,
    )  # fmt: skip
    result = train.run(spec, SILENT).result
    out = tmp_path / "adapter"
    assert sorted(path.name for path in (out / "steps").iterdir()) == ["2", "4"]
    assert result.kept_step == 4
    assert weights(out) == weights(out / "steps" / "4") != weights(out / "steps" / "2")
    assert "lm_head" not in result.targets
    assert LoraAdapter.read(out).scaling("model.layers.1.mlp.up_proj") == 16 / 2
    curve = read_curve_csv(out / "loss.csv")
    scored = {row.step: row.loss for row in curve if row.split == "recovered"}
    assert list(scored) == [0, 2, 4]
    assert result.best_step == min((2, 4), key=scored.get)
    assert result.recovered_loss_before == round(scored[0], 4)
    assert result.recovered_loss_after == round(scored[4], 4)

    words = ["recover", "--in", out, "--model", base, "--run", tmp_path / "run"]
    for checkpoint, step in (("2", "2"), ("best", str(result.best_step))):
        place = tmp_path / f"recovered-{checkpoint}"
        asked = [*words, "--checkpoint", checkpoint, "--out", place]
        assert run_command([str(word) for word in asked]) == 0
        small = load_file(out / "steps" / step / "adapter_model.safetensors")
        full = load_file(place / "adapter_model.safetensors")
        for name, factor in small.items():
            assert int(full[name].count_nonzero()) == int(factor.count_nonzero()), name
    capsys.readouterr()
    assert run_command([str(word) for word in [*words, "--checkpoint", "3"]]) == 2
    err = capsys.readouterr().err
    assert "has no such checkpoint" in err and "kept are 2, 4" in err


def test_the_best_checkpoint_is_the_output(finished_run, instructions, tmp_path):
    how = {"steps": 4, "save_steps": 1, "eval_steps": 1, "learning_rate": 3.0}
    spec = spec_of(finished_run, instructions, tmp_path / "adapter", **how)
    result = train.run(spec, SILENT).result
    out = tmp_path / "adapter"
    losses = {r.step: r.loss for r in read_curve_csv(out / "loss.csv") if r.split == "eval"}
    best = min((1, 2, 3, 4), key=losses.get)
    assert result.best_step == result.kept_step == best
    assert result.eval_loss_after == round(losses[best], 4)
    assert weights(out) == weights(out / "steps" / str(best))
    recorded = json.loads((out / "loram.json").read_text())
    assert f"steps/{best}/adapter_model.safetensors" in recorded["outputs"]
    assert result.tokens > 0 and result.computed_tokens >= result.tokens


def test_the_full_model_is_looked_for_before_any_work(finished_run, instructions, tmp_path, base):
    with pytest.raises(UsageError, match="is for a pruned model"):
        train.plan(
            train.TrainSpec(
                source=base, out=tmp_path / "x", data=str(instructions), score_recovered=True,
                **SMALL,
            ),
            SILENT,
        )  # fmt: skip
    from loram_cli.stages.train.recovered import open_base

    with pytest.raises(LoramError, match="the full model is not at"):
        open_base({"path": str(tmp_path / "gone")})


def test_recover_without_checkpoints_says_so(finished_run, base, tmp_path):
    spec = recover.RecoverSpec(
        adapter=finished_run / "adapter", model=base, out=tmp_path / "x", checkpoint="seven"
    )
    with pytest.raises(UsageError, match="--checkpoint seven"):
        recover.plan(spec, SILENT)
