"""Experiment trackers beside our own loss curve, through transformers' callbacks."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError, reason_of
from loram_cli.training.choices import Tracker

TENSORBOARD_FOLDER = "tensorboard"


def check_trackers(names: Sequence[Tracker]) -> None:
    """Refuse trackers whose package is absent, before any long work.

    Raises:
        LoramError: Names the package, and how to get it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise LoramError(
                f"--report-to {name}: the package {name} is not installed",
                f"pip install 'loram[{name}]', or do without: loss.csv is always written",
            )


def tracking_callbacks(names: Sequence[Tracker], work_dir: Path) -> list[Any]:
    """The trainer's callbacks for the trackers.

    Raises:
        LoramError: From their callbacks, when training begins: nobody is logged in, or a server
            does not answer.
    """
    callbacks: list[Any] = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(work_dir / TENSORBOARD_FOLDER))))
    if "wandb" in names:
        callbacks.append(_wandb_callback())
    if "mlflow" in names:
        callbacks.append(_mlflow_callback())
    if "swanlab" in names:
        callbacks.append(_swanlab_callback())
    return callbacks


def _wandb_callback() -> Any:
    import wandb
    from transformers.integrations import WandbCallback

    class Wandb(WandbCallback):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().setup(*args, **kwargs)
            except wandb.Error as error:
                raise LoramError(
                    f"--report-to wandb: {reason_of(error)}",
                    "run 'wandb login', or set WANDB_MODE=offline",
                ) from error

    return Wandb()


def _mlflow_callback() -> Any:
    import mlflow
    from transformers.integrations import MLflowCallback

    class MLflow(MLflowCallback):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().setup(*args, **kwargs)
            except mlflow.exceptions.MlflowException as error:
                raise LoramError(
                    f"--report-to mlflow: {reason_of(error)}",
                    "set MLFLOW_TRACKING_URI to a server or a folder that can be written",
                ) from error

    return MLflow()


def _swanlab_callback() -> Any:
    import swanlab
    from transformers.integrations import SwanLabCallback

    class SwanLab(SwanLabCallback):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            try:
                # The parent asks for the run, which from 0.10 on raises where there is none.
                if not _has_run(swanlab):
                    swanlab.init(project=os.environ.get("SWANLAB_PROJECT"))
                super().setup(*args, **kwargs)
            # Its errors share no class of their own.
            except (Exception, SystemExit) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise LoramError(
                    f"--report-to swanlab: {lines[0][:200]}",
                    "run 'swanlab login', or set SWANLAB_MODE=offline",
                ) from error

    return SwanLab()


def _has_run(swanlab: Any) -> bool:
    try:
        return swanlab.get_run() is not None
    except RuntimeError:
        return False
