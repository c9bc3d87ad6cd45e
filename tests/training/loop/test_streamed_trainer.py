"""Training layer by layer beside the resident model: the same to the bit, and as easy to stop."""

import os
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.factors import assert_same, trained

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.modeling.layerwise.lora_pass import streamed_lora
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import attach_lora, lora_config, lora_targets
from loram_cli.training.loop.loop import fit_lora
from loram_cli.training.loop.options import FitOptions

SILENT = NullReporter()
OPTIONS = FitOptions(
    learning_rate=5e-3, steps=6, batch=8, micro_batch=2, warmup_steps=1, checkpoint_steps=2,
    eval_steps=3, seed=7,
)  # fmt: skip


@contextmanager
def streamed(directory, *, dtype=torch.float32, nf4=False, dropout=0.05, **how):
    family = family_for(read_config(directory), "test")
    skeleton = SkeletonModel(directory, dtype=dtype, device="cpu", nf4=nf4)
    tied = family.geometry(read_config(directory)).tied_embeddings
    targets = lora_targets(family, tied_embeddings=tied, reporter=SILENT)
    model = attach_lora(skeleton.model, lora_config(targets, dropout=dropout), seed=3)
    with streamed_lora(skeleton, model, SILENT, **how) as passes:
        yield passes


def fit_streamed(directory, rows, evaluation, options, work_dir, reporter=SILENT, **how):
    with streamed(directory, **how) as passes:
        result = fit_lora(
            passes.model, rows, evaluation, options, work_dir, reporter, streamed=passes
        )
        return result, trained(passes.model)


@pytest.mark.parametrize("stay", [0, 1, 3])
def test_every_step_is_the_resident_models(narrow_dir, with_lora, rows, tmp_path, stay):
    whole = with_lora()
    expected = fit_lora(whole, rows, rows[:5], OPTIONS, tmp_path / "whole", SILENT)
    result, factors = fit_streamed(
        narrow_dir, rows, rows[:5], OPTIONS, tmp_path / "streamed", stay=stay
    )
    assert result.history == expected.history
    assert_same(factors, trained(whole))


def test_mixed_precision_gives_the_resident_models_steps(
    narrow_dir, load, with_lora, rows, tmp_path
):
    options = replace(OPTIONS, precision="bf16")
    whole = with_lora(load(dtype=torch.bfloat16))
    expected = fit_lora(whole, rows, rows[:5], options, tmp_path / "whole", SILENT)
    result, factors = fit_streamed(
        narrow_dir, rows, rows[:5], options, tmp_path / "streamed", dtype=torch.bfloat16
    )
    assert result.history == expected.history
    assert_same(factors, trained(whole))


def test_stopped_and_resumed_equals_an_undisturbed_run(narrow_dir, rows, reporter, tmp_path):
    expected, factors = fit_streamed(narrow_dir, rows, rows[:4], OPTIONS, tmp_path / "whole")

    def interrupt(done):
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    reporter.on_advance = interrupt
    with pytest.raises(KeyboardInterrupt):
        fit_streamed(narrow_dir, rows, rows[:4], OPTIONS, tmp_path / "cut", reporter)
    assert "stopped at step 3 of 6" in reporter.notes[-1]
    result, resumed = fit_streamed(narrow_dir, rows, rows[:4], OPTIONS, tmp_path / "cut")
    assert result.resumed_from == 3
    assert result.history == expected.history
    assert_same(resumed, factors)


def test_resident_training_goes_on_from_a_streamed_checkpoint(
    narrow_dir, with_lora, rows, reporter, tmp_path
):
    whole = with_lora()
    expected = fit_lora(whole, rows, rows[:4], OPTIONS, tmp_path / "whole", SILENT)
    reporter.on_advance = lambda done: done == 4 and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_streamed(narrow_dir, rows, rows[:4], OPTIONS, tmp_path / "cut", reporter)
    model = with_lora()
    result = fit_lora(model, rows, rows[:4], OPTIONS, tmp_path / "cut", SILENT)
    assert result.resumed_from == 4
    assert result.history == expected.history
    assert_same(trained(model), trained(whole))
