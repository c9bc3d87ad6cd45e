"""Adapters of a training's checkpoints in its output: ``steps/N`` beside the adapter itself."""

import shutil
from pathlib import Path

from loram_cli.errors import UsageError
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from loram_cli.reporting import Reporter
from loram_cli.runs.whole import MARK_NAME, damage
from loram_cli.training.loop.checkpoints import kept_path, kept_steps
from loram_cli.units import whole_number

STEPS_NAME = "steps"
BEST = "best"
_SCRATCH = "checkpoints"


def put_steps(path: Path, reporter: Reporter) -> list[int]:
    """Copy the adapters that were kept while training into the output.

    Args:
        path: The output being made; its checkpoints are still there.
        reporter: Told of an adapter that is no longer what was written, and left out.

    Returns:
        Their steps, in order.
    """
    steps = []
    shutil.rmtree(path / STEPS_NAME, ignore_errors=True)
    for step in kept_steps(path / _SCRATCH):
        kept = kept_path(path / _SCRATCH, step)
        wrong = damage(kept)
        if wrong is not None:
            reporter.warn(f"the adapter kept of step {step} is damaged ({wrong}): left out")
            continue
        steps.append(step)
        unmarked = shutil.ignore_patterns(MARK_NAME)
        shutil.copytree(kept, path / STEPS_NAME / str(step), ignore=unmarked)
    return steps


def take_step(path: Path, step: int) -> None:
    """Make the adapter of a step the output's own."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(path / STEPS_NAME / str(step) / name, path / name)


def checkpoint_directory(adapter: Path, checkpoint: str, best: int | None) -> Path:
    """Where the adapter of a checkpoint lies.

    Args:
        adapter: An output of ``train``.
        checkpoint: A step, or ``best``.
        best: The best step, as training recorded it.

    Raises:
        UsageError: It is no step, or was not kept; names those that were.
    """
    folder = adapter / STEPS_NAME
    found = folder.iterdir() if folder.is_dir() else ()
    numbers = (whole_number(path.name) for path in found)
    steps = sorted(number for number in numbers if number is not None)
    listed = ", ".join(map(str, steps)) or "none"
    if checkpoint == BEST and best is None:
        raise UsageError(
            f"--checkpoint best: {adapter} was trained without held-out data",
            f"kept are {listed}",
        )
    step = best if checkpoint == BEST else whole_number(checkpoint)
    if step not in steps:
        raise UsageError(
            f"--checkpoint {checkpoint}: {adapter} has no such checkpoint",
            f"kept are {listed}; train --keep-checkpoints and --save-steps keep more",
        )
    return folder / str(step)
