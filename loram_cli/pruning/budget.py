"""A budget in place of a ratio: the smallest ratio whose pruned model fits."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from loram_cli.arch.spec import Family, Geometry, LayerGeometry
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import USABLE_SHARE, training_memory
from loram_cli.pruning.plan import layer_widths

# Ratios are tried in steps of 1e-5: less than one MLP channel of any model.
_STEPS = 100_000


def smallest_ratio(
    geometry: Geometry,
    keep_first: int,
    keep_last: int,
    fits: Callable[[tuple[LayerGeometry, ...]], bool],
    multiple_of: int = 1,
    plain: bool = False,
) -> float | None:
    """The smallest ratio whose widths fit, or None where not even the largest does.

    Args:
        geometry: The base's widths.
        keep_first: Layers at the input side that stay whole.
        keep_last: Layers at the output side that stay whole.
        fits: Whether a model of these widths fits; where it does, narrower ones must too.
        multiple_of: See :func:`~loram_cli.pruning.plan.narrowed`.
        plain: See :func:`~loram_cli.pruning.plan.layer_widths`.
    """

    def tried(step: int) -> bool:
        ratio = step / _STEPS
        return fits(layer_widths(geometry, ratio, keep_first, keep_last, multiple_of, plain))

    high = round(largest_ratio(geometry) * _STEPS)
    if not tried(high):
        return None
    low = 0
    # tried(low) is false or never asked, tried(high) is true.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tried(middle) else (middle, high)
    return high / _STEPS


def largest_ratio(geometry: Geometry) -> float:
    """The largest ratio that is tried: one channel of the narrowest MLP stays."""
    narrowest = min(layer.intermediate_size for layer in geometry.layers)
    return min(_STEPS - 1, _STEPS * (narrowest - 1) // narrowest) / _STEPS


def card_bytes(family: Family, config: Mapping[str, Any], setup: TrainingSetup) -> int:
    """Memory of the smallest card on which a LoRA training of a model fits."""
    return math.ceil(training_memory(family, config, setup).total / USABLE_SHARE)
