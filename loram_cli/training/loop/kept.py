"""Adapters of a training's checkpoints: kept beside them, to be recovered or scored afterwards."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process
from loram_cli.runs.staging import sync
from loram_cli.runs.whole import mark_whole
from loram_cli.training.loop.checkpoints import kept_path, kept_steps
from loram_cli.training.loop.options import best_step, curve_rows, evaluations_since_best


class KeepAdapters(TrainerCallback):
    """Makes a checkpoint at each new best evaluation, keeps its adapter, and stops early.

    What it decides by is the trainer's log, which a resumed training has as well.

    Args:
        folder: Of the checkpoints.
        count: How many are kept beside the best one, the newest ones.
        patience: Evaluations in a row without a new best one, after which training stops; None
            goes on.
        save: Writes the adapter as it is into a directory; every process calls it.
        reporter: Told when training stops early.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        patience: int | None,
        save: Callable[[Path], None],
        reporter: Reporter,
    ) -> None:
        self._folder, self._count, self._patience = folder, count, patience
        self._save, self._reporter = save, reporter

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the best one saved; stop where nothing has become better for long."""
        history = curve_rows(state.log_history)
        if state.global_step and best_step(history) == state.global_step:
            control.should_save = True
        if self._patience is None or evaluations_since_best(history) < self._patience:
            return
        if state.global_step < state.max_steps:
            self._reporter.note(
                f"stopped early at step {state.global_step} of {state.max_steps}: the held-out "
                f"figure was best at step {best_step(history)}"
            )
        control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep this step's adapter, and drop those that are one too many."""
        place = kept_path(self._folder, state.global_step)
        partial = place.with_name(f"{place.name}.partial")
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._save(partial)
        if not is_main_process():
            return
        mark_whole(partial)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        sync(place.parent)
        steps = kept_steps(self._folder)
        staying = {best_step(curve_rows(state.log_history)), state.global_step}
        staying |= set(steps[-self._count :]) if self._count else set()
        for step in steps:
            if step not in staying:
                shutil.rmtree(kept_path(self._folder, step))
