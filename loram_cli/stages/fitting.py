"""What alignment and LoRA training do alike: options of the fit, and what is left of it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import UsageError
from loram_cli.stages.common import check_positive

if TYPE_CHECKING:
    from loram_cli.stages.align import AlignSpec
    from loram_cli.stages.train import TrainSpec
    from loram_cli.training.options import FitOptions, FitResult


def check_fit(spec: "AlignSpec | TrainSpec") -> None:
    """Refuse settings of the fit that cannot be.

    Raises:
        UsageError: A number that must be above zero is not, or the batch does not divide.
    """
    check_positive(spec, "learning_rate", "steps", "batch", "micro_batch")
    check_positive(spec, "save_steps", "eval_steps")
    if spec.batch % spec.micro_batch:
        raise UsageError(f"--batch {spec.batch} is no multiple of --micro-batch {spec.micro_batch}")


def fit_options(spec: "AlignSpec | TrainSpec") -> "FitOptions":
    """The spec's share that says how to fit."""
    from loram_cli.training.options import FitOptions

    return FitOptions(
        learning_rate=spec.learning_rate,
        steps=spec.steps,
        warmup_steps=spec.warmup_steps,
        batch=spec.batch,
        micro_batch=spec.micro_batch,
        checkpoint_steps=spec.save_steps,
        eval_steps=spec.eval_steps,
        seed=spec.seed,
        gradient_checkpointing=spec.gradient_checkpointing,
        precision=spec.precision,
        report_to=spec.report_to,
    )


def prepare_tracking(spec: "AlignSpec | TrainSpec") -> None:
    """Refuse trackers that are not installed.

    Raises:
        LoramError: Names the package, and how to get it.
    """
    if spec.report_to:
        from loram_cli.training.tracking import check_trackers

        check_trackers(spec.report_to)


def finish_fit(fitted: "FitResult", path: Path, title: str) -> dict[str, Any]:
    """Draw the loss curve, drop the checkpoints, and give the losses for the manifest.

    Args:
        fitted: What the fit gave back.
        path: The stage's directory.
        title: Headline of the picture.
    """
    from loram_cli.training.curves import draw_curve, write_curve_csv

    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    write_curve_csv(fitted.history, path / "loss.csv")
    draw_curve(fitted.history, path / "loss.png", title)
    evals = fitted.eval_losses()
    return {
        "final_train_loss": round(fitted.final_loss, 4),
        "eval_loss_before": round(evals[0], 4) if evals else None,
        "eval_loss_after": round(evals[1], 4) if evals else None,
    }
