"""Which checkpoint is kept, when training stops early, and that both survive an interruption."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from helpers.factors import assert_same, trained
from safetensors.torch import load_file

from loram_cli.reporting import NullReporter
from loram_cli.training.loop.checkpoints import kept_path, kept_steps
from loram_cli.training.loop.loop import fit_lora
from loram_cli.training.loop.options import (
    FitOptions,
    LossRow,
    best_step,
    evaluations_since_best,
)
from loram_cli.training.loop.trainer import StepTrainer

pytestmark = pytest.mark.integration

OPTIONS = FitOptions(
    learning_rate=5e-3, steps=6, batch=4, micro_batch=4, warmup_steps=0, checkpoint_steps=4,
    eval_steps=1, keep_checkpoints=1, seed=7,
)  # fmt: skip
# Evaluation losses of the steps 0 to 6.
COURSE = [3.0, 2.5, 2.0, 2.2, 2.1, 2.3, 2.4]


@pytest.fixture
def course(monkeypatch):
    """Held-out losses as they are told here, whatever the model has learnt."""

    def set_course(losses):
        def batch_losses(self, batches):
            for _ in batches:
                yield losses[self.state.global_step], 1

        monkeypatch.setattr(StepTrainer, "_batch_losses", batch_losses)

    return set_course


def eval_row(step, loss, **figures):
    return LossRow(step, "eval", loss, None, figures)


def test_the_best_is_the_lowest_loss_after_the_start_or_the_highest_reward():
    history = [eval_row(step, loss) for step, loss in enumerate(COURSE)]
    assert best_step(history) == 2
    assert evaluations_since_best(history) == 4
    assert best_step([eval_row(0, 1.0), eval_row(1, 2.0), eval_row(2, 2.0)]) == 1
    rewards = [
        eval_row(1, 0.1, reward=0.0),
        eval_row(2, 0.5, reward=0.4),
        eval_row(3, 0.2, reward=0.3),
    ]
    assert best_step(rewards) == 2
    assert best_step([LossRow(1, "train", 1.0)]) is None


def test_the_best_checkpoint_outlives_newer_ones(with_lora, rows, tmp_path, course):
    course(COURSE)
    result = fit_lora(with_lora(), rows, rows[:2], OPTIONS, tmp_path, NullReporter())
    assert (result.steps, result.best_step) == (6, 2)
    # Best, and the newest one.
    assert kept_steps(tmp_path / "checkpoints") == [2, 6]
    halfway = with_lora()
    fit_lora(
        halfway,
        rows,
        [],
        replace(OPTIONS, steps=2, lr_scheduler="constant"),
        tmp_path / "b",
        NullReporter(),
    )
    expected = fit_lora(
        with_lora(),
        rows,
        rows[:2],
        replace(OPTIONS, lr_scheduler="constant"),
        tmp_path / "c",
        NullReporter(),
    )
    assert expected.best_step == 2
    kept = load_file(kept_path(tmp_path / "c" / "checkpoints", 2) / "adapter_model.safetensors")
    mine = {n.replace(".default", ""): p for n, p in trained(halfway).items()}
    assert kept.keys() == mine.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, mine[name]), name


def test_training_stops_once_nothing_becomes_better(with_lora, rows, reporter, tmp_path, course):
    course(COURSE)
    options = replace(OPTIONS, early_stopping=2)
    model = with_lora()
    result = fit_lora(model, rows, rows[:2], options, tmp_path, reporter)
    assert (result.steps, result.best_step) == (4, 2)
    assert "stopped early at step 4 of 6: the held-out figure was best at step 2" in reporter.notes
    # The same command again has nothing left to do.
    again = with_lora()
    once_more = fit_lora(again, rows, rows[:2], options, tmp_path, reporter)
    assert once_more.history == result.history
    assert once_more.resumed_from == 4
    assert_same(trained(again), trained(model))


def test_an_interrupted_training_remembers_what_was_best(
    with_lora, rows, reporter, tmp_path, course
):
    course(COURSE)
    options = replace(OPTIONS, early_stopping=3, packing="auto", micro_batch=2)
    expected = fit_lora(with_lora(), rows, rows[:2], options, tmp_path / "whole", NullReporter())
    reporter.on_advance = lambda done: done == 3 and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_lora(with_lora(), rows, rows[:2], options, tmp_path / "cut", reporter)
    result = fit_lora(with_lora(), rows, rows[:2], options, tmp_path / "cut", NullReporter())
    assert (result.steps, result.resumed_from) == (5, 3)
    assert result.history == expected.history
    assert (result.tokens, result.computed_tokens) == (expected.tokens, expected.computed_tokens)
    for name in ("whole", "cut"):
        assert 2 in kept_steps(tmp_path / name / "checkpoints")


def test_checkpoints_of_other_settings_leave_no_adapters(with_lora, rows, tmp_path):
    fit_lora(with_lora(), rows, [], replace(OPTIONS, steps=4), tmp_path, NullReporter())
    assert kept_steps(tmp_path / "checkpoints") == [4]
    fit_lora(with_lora(), rows, [], replace(OPTIONS, steps=2), tmp_path, NullReporter())
    assert kept_steps(tmp_path / "checkpoints") == [2]


def test_schedule_decay_and_clipping_reach_the_trainer(with_lora, rows, tmp_path):
    options = replace(
        OPTIONS, steps=3, lr_scheduler="constant", weight_decay=0.1, max_grad_norm=0.0,
        warmup_steps=1, keep_checkpoints=None,
    )  # fmt: skip
    result = fit_lora(with_lora(), rows, [], options, tmp_path, NullReporter())
    rates = [row.learning_rate for row in result.history]
    assert rates == pytest.approx([0.0, 5e-3, 5e-3])
    state = json.loads(
        (tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text()
    )
    group = torch.load(
        tmp_path / "checkpoints" / "checkpoint-3" / "optimizer.pt", weights_only=True
    )["param_groups"][0]
    assert group["weight_decay"] == 0.1
    assert state["global_step"] == 3


def test_packed_steps_have_the_losses_of_padded_ones(with_lora, rows, tmp_path):
    losses = []
    for packing in ("off", "auto", "on"):
        options = replace(OPTIONS, packing=packing, batch=8, micro_batch=8, keep_checkpoints=None)
        result = fit_lora(
            with_lora(dropout=0.0), rows, rows[:5], options, tmp_path / packing, NullReporter()
        )
        losses.append([row.loss for row in result.history])
        assert result.tokens == sum(len(rows[i].input_ids) for i in _steps(len(rows), 8, 6))
        assert (result.computed_tokens == result.tokens) == (packing == "on")
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def _steps(count, batch, steps):
    from loram_cli.training.loop.order import EndlessOrder

    order = EndlessOrder(count, batch, OPTIONS.seed)
    return [row for step in range(steps) for row in order.step(step)]


def test_a_loss_that_is_not_finite_names_the_checkpoint_that_is_there(tmp_path):
    from loram_cli.runs.whole import mark_whole
    from loram_cli.training.loop.checkpoints import checkpoint_path, newest_whole

    assert newest_whole(tmp_path) == 0
    for step in (2, 4):
        checkpoint_path(tmp_path, step).mkdir()
    mark_whole(checkpoint_path(tmp_path, 2))
    assert newest_whole(tmp_path) == 2
