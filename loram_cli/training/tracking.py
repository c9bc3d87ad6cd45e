"""Experiment trackers beside our own loss curve: tensorboard and wandb, through transformers."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
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
        LoramError: From the callback of wandb, when training begins: nobody is logged in.
    """
    callbacks: list[Any] = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(work_dir / TENSORBOARD_FOLDER))))
    if "wandb" in names:
        callbacks.append(_wandb_callback())
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
                    f"--report-to wandb: {str(error).splitlines()[0]}",
                    "run 'wandb login', or set WANDB_MODE=offline",
                ) from error

    return Wandb()
