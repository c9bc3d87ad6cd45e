"""Importance of coupled groups, from element saliences of one layer's tensors.

A key/value head is coupled with its query heads, its value rows and the output columns that read
it; an MLP channel with a row of gate and up and a column of down. A group's score is the sum of
its elements' saliences over all coupled tensors (LLM-Pruner, arXiv 2305.11627, section 3.2).
"""

from collections.abc import Callable

import torch

from loram_cli.arch.spec import Axis, Family, LayerGeometry, LinearModule

LayerScores = dict[str, torch.Tensor]
"""``key_value``: shape (num_key_value_heads,); ``intermediate``: shape (intermediate_size,)."""


def taylor_salience(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """First-order Taylor salience of each element, ``|w * dL/dw|`` (LLM-Pruner, eq. 5)."""
    return (weight.float() * gradient.float()).abs()


def l2_salience(weight: torch.Tensor) -> torch.Tensor:
    """Squared magnitude of each element; summed over a group it ranks by the group's L2 norm."""
    return weight.float().square()


def layer_scores(
    family: Family, layer: LayerGeometry, salience: Callable[[LinearModule], torch.Tensor]
) -> LayerScores:
    """Score every group of one layer.

    Args:
        family: Tells which axis of which module runs over which groups.
        layer: The layer's widths before pruning.
        salience: Gives the element saliences of a module's weight, shape (rows, columns). Called
            once per module, so that one tensor at a time is held.

    Returns:
        Scores in float64, since sums over millions of elements decide near ties.
    """
    scores = {
        "key_value": torch.zeros(layer.num_key_value_heads, dtype=torch.float64),
        "intermediate": torch.zeros(layer.intermediate_size, dtype=torch.float64),
    }
    for module in family.modules:
        if not module.rows and not module.columns:
            continue
        elements = salience(module)  # (rows, columns)
        for axes, dim in ((module.rows, 1), (module.columns, 0)):
            if axes:
                _add_segments(scores, axes, layer, elements.sum(dim=dim, dtype=torch.float64))
    return scores


def _add_segments(
    scores: LayerScores, axes: tuple[Axis, ...], layer: LayerGeometry, sums: torch.Tensor
) -> None:
    start = 0
    for axis in axes:
        units = layer.axis_units(axis)
        kind = "intermediate" if axis == "intermediate" else "key_value"
        groups = scores[kind].shape[0]
        scores[kind] += sums[start : start + units].reshape(groups, -1).sum(dim=1)
        start += units
