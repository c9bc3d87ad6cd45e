"""The factor by which a recovered update is scaled.

An update that was learnt on a small model, with most of its rows and columns gone, moves the full
model less than it moved the small one. A single factor on all of it makes up for most of that. It
is found by forward passes of the full model over examples of the training data: no gradients, and
no weights in memory beside the model's, which comes layer by layer where it does not fit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.schema import spec_from_mapping
from loram_cli.stages.core.data_digests import data_digest
from loram_cli.stages.recover.spec import RecoverSpec
from loram_cli.stages.recover.work import RecoverWork

if TYPE_CHECKING:
    from loram_cli.stages.train.spec import TrainSpec
    from loram_cli.training.data.tokens import TokenRow

_STEP = 1.5
# Of the search, and its inverse the smallest.
_LARGEST = 8.0
# Two factors whose logarithms differ by less need not both be tried.
_SAME = 0.03
# An update that is best smaller than this mostly made up for what the small model lacked.
_SUSPICIOUS = 0.6
# Passes over the examples that the search takes at most, for the progress line.
_MOST_PASSES = 9


def check_scalable(manifest: Manifest) -> "TrainSpec":
    """The training behind an adapter, whose data the scale is fitted on.

    Raises:
        LoramError: The data has changed, or is not there any more.
        UsageError: It was not supervised training.
    """
    from loram_cli.stages.train.spec import TrainSpec

    if manifest.stage != "train":
        raise UsageError(
            "--fit-scale needs the data that loram trained the adapter on, and another trainer "
            "made this one",
            "leave out --fit-scale",
        )
    spec = spec_from_mapping(TrainSpec, manifest.spec, "the adapter's record")
    if spec.objective != "sft":
        raise UsageError(
            f"--fit-scale goes by the loss of given answers, and this adapter learnt by "
            f"{spec.objective}",
            "leave out --fit-scale",
        )
    recorded = manifest.inputs.get("data", {}).get("content")
    try:
        now = data_digest(spec.data)
    except LoramError as error:
        raise LoramError(
            f"--fit-scale: {error.message}", "put the training data back, or leave out --fit-scale"
        ) from error
    if recorded is not None and now != recorded:
        raise LoramError(
            f"--fit-scale: {spec.data} is not what the adapter was trained on: it has changed",
            "put the training data back, or leave out --fit-scale",
        )
    return spec


def fit_scale(
    spec: RecoverSpec, work: RecoverWork, recovered: Path, reporter: Reporter
) -> tuple[float, dict[float, float]]:
    """Find the factor that lowers the full model's loss on training examples most.

    Args:
        spec: Of the recovery.
        work: Its inputs.
        recovered: The adapter at the full shapes, not scaled.
        reporter: Told of progress.

    Returns:
        The factor, and the losses in nats a token by factor: at least those of 1 and of the best.

    Raises:
        LoramError: The data cannot be read, or the full model does not fit even layer by layer.
    """
    from loram_cli.evaluation.models import opened_model
    from loram_cli.training.adapters import lora_scaling
    from loram_cli.training.loop.mean_loss import mean_loss

    rows = _rows(spec, work, reporter)
    with (
        opened_model("full model", work.model, [recovered], reporter, device=spec.device) as model,
        reporter.progress("fit scale", _MOST_PASSES, "pass") as progress,
    ):

        def loss_at(scale: float) -> float:
            with lora_scaling(model, scale):
                loss = mean_loss(model, rows)
            progress.advance()
            progress.detail(f"scale {scale:g}: loss {loss:.3f}")
            return loss

        scale, losses = best_scale(loss_at)
    if scale < _SUSPICIOUS:
        reporter.warn(
            f"the update is best at {scale:.2g} of its size: it learnt what the small model lacked "
            "more than what the data holds. Align the small model (loram align --method "
            "reconstruct), and train again"
        )
    return scale, losses


def best_scale(loss_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The factor with the smallest loss: steps outward from 1, then the vertex of a parabola.

    The parabola goes through the best factor and its two neighbours, over the factor's logarithm.

    Args:
        loss_at: The loss by factor; one that is not finite counts as the largest.

    Returns:
        The best factor that was tried, and all losses by factor.
    """
    losses: dict[float, float] = {}

    def scale_of(power: float) -> float:
        return round(_STEP**power, 2)

    def tried(scale: float) -> float:
        if scale not in losses:
            loss = loss_at(scale)
            losses[scale] = loss if math.isfinite(loss) else math.inf
        return losses[scale]

    best, direction = 0, 1
    if tried(scale_of(1)) >= tried(scale_of(0)):
        direction = -1
    while 1 / _LARGEST < _STEP ** (best + direction) < _LARGEST:
        if tried(scale_of(best + direction)) >= tried(scale_of(best)):
            break
        best += direction
    around = [scale_of(best + step) for step in (-1, 0, 1)]
    # Neighbours on both sides are known but where the search came to its end.
    if all(scale in losses for scale in around):
        vertex = scale_of(best + _vertex([losses[scale] for scale in around]))
        if all(abs(math.log(vertex / scale)) > _SAME for scale in losses):
            tried(vertex)
    # The one nearest to 1 where two are alike, so that noise does not scale.
    scale = min(losses, key=lambda scale: (losses[scale], abs(math.log(scale))))
    return scale, dict(sorted(losses.items()))


def scaled(adapter: LoraAdapter, scale: float) -> LoraAdapter:
    """An adapter whose update is ``scale`` times as large: ``lora_B`` is, and nothing else."""
    pairs = {
        module: LoraPair(pair.lora_a, (pair.lora_b.float() * scale).to(pair.lora_b.dtype))
        for module, pair in adapter.pairs.items()
    }
    return replace(adapter, pairs=pairs)


def _vertex(losses: Sequence[float]) -> float:
    """Where the parabola through losses at -1, 0 and 1 is lowest, between -1 and 1."""
    before, here, after = losses
    bend = before - 2 * here + after
    if not math.isfinite(bend) or bend <= 0:
        return 0.0
    return max(-1.0, min(1.0, (before - after) / (2 * bend)))


def _rows(spec: RecoverSpec, work: RecoverWork, reporter: Reporter) -> "list[TokenRow]":
    """Training examples as tokens, drawn as the training's seed says."""
    from loram_cli.modeling.load import load_tokenizer
    from loram_cli.stages.train.data import training_rows
    from loram_cli.training.data.template_names import with_adapter_template

    trained = check_scalable(work.manifest)
    tokenizer: Any = with_adapter_template(load_tokenizer(spec.model), spec.adapter)
    return training_rows(trained, tokenizer, spec.scale_examples, reporter)
