"""What goes with a pruning strategy, and what does not."""

from typing import TYPE_CHECKING

from loram_cli.errors import UsageError

if TYPE_CHECKING:
    from loram_cli.stages.prune.stage import PruneSpec


def check_method(spec: "PruneSpec") -> None:
    """Refuse what does not go together with the strategy.

    Raises:
        UsageError: Another ratio than 2:4 has, a way to choose that is not the strategy's, a
            setting out of range, or no text where text is needed.
    """
    if spec.strategy == "semi" and spec.ratio != 0.5:
        raise UsageError(
            f"--strategy semi with --ratio {spec.ratio}: 2:4 zeroes two of every four weights",
            "pass --ratio 0.5, or --strategy unst",
        )
    choices = {"rand": (), "stru": ("taylor", "l2")}.get(spec.strategy, ("sparsegpt", "l2"))
    if spec.importance is not None and spec.importance not in choices:
        raise UsageError(
            f"--importance {spec.importance} does not go with --strategy {spec.strategy}",
            f"it takes {' or '.join(choices) or 'none: groups are drawn'}",
        )
    if spec.calibration_memory_bytes < 0:
        raise UsageError("--calibration-memory cannot be negative")
    if not 0 <= spec.dampening < float("inf"):
        raise UsageError(f"--dampening {spec.dampening} must be 0 or more")
    if spec.block_columns < 1 or (spec.strategy == "semi" and spec.block_columns % 4):
        raise UsageError("--block-columns must be above 0, and a multiple of 4 for semi")
    if spec.needs_calibration and spec.calibration is None:
        why = "ranks by gradients on text" if spec.method == "taylor" else "updates on text"
        raise UsageError(
            f"--strategy {spec.strategy} {why}, and no --calibration is given",
            "pass --calibration FILE, or --importance l2, which needs no text",
        )
