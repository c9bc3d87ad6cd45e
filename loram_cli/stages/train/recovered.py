"""The held-out loss of a training's checkpoints on the full model.

The small model's loss misjudges a checkpoint that is to be used on the full one, the more so the
more was pruned. Here every kept adapter is recovered and put on the base, which is loaded once:
whole where it fits the device, else layer by layer.
"""

import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.evaluation.models import opened_model
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.stages.core.full_shapes import FullShapes, recover_adapter
from loram_cli.stages.core.lineage import differences, model_record
from loram_cli.stages.core.steps import STEPS_NAME
from loram_cli.training.adapters import put_factors
from loram_cli.training.data.tokens import TokenRow
from loram_cli.training.loop.mean_loss import mean_loss
from loram_cli.training.loop.options import LossRow


def open_base(base: Mapping[str, Any]) -> Model:
    """The full model that a small one was pruned from, where its manifest says.

    Raises:
        LoramError: It is not there any more, or is another one.
    """
    directory = Path(str(base["path"]))
    if not (directory / "config.json").is_file():
        raise LoramError(
            f"--score-recovered: the full model is not at {directory} any more",
            "put it back, or train without --score-recovered",
        )
    model = Model.open(directory)
    model.check_whole(tokenizer=False)
    for said in differences(base, model_record(model)):
        raise LoramError(f"--score-recovered: {directory} is another base: {said} differ")
    return model


def recovered_losses(
    base: Model,
    keep: Mapping[str, Any],
    path: Path,
    steps: Sequence[int],
    rows: Sequence[TokenRow],
    device: str,
    reporter: Reporter,
) -> tuple[LossRow, ...]:
    """Mean loss per token on the full model: of itself (step 0), and with each adapter.

    Args:
        base: The full model.
        keep: What was kept of it in the model that was trained.
        path: The output of training, with the adapters of ``steps``.
        steps: In order; at least one.
        rows: Held-out examples.
        device: To run on.
        reporter: Progress and warnings.

    Raises:
        LoramError: The full model does not fit even layer by layer.
    """
    # What the small model has left behind.
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    shapes = FullShapes.of(base, keep)
    silent = NullReporter()
    with tempfile.TemporaryDirectory(dir=path) as folder:
        full = Path(folder)
        for step in steps:
            (full / str(step)).mkdir()
            small = LoraAdapter.read(path / STEPS_NAME / str(step))
            recover_adapter(small, shapes, silent).write(full / str(step))
        first = [full / str(steps[0])]
        found = []
        with (
            opened_model("full model", base, first, reporter, device=device) as model,
            reporter.progress("score", len(steps) + 1, "checkpoint") as progress,
        ):
            with model.disable_adapter():
                found.append(LossRow(0, "recovered", mean_loss(model, rows)))
            progress.advance()
            for step in steps:
                put_factors(model, full / str(step))
                found.append(LossRow(step, "recovered", mean_loss(model, rows)))
                progress.advance()
                progress.detail(f"step {step}: loss {found[-1].loss:.3f}")
    return tuple(found)
