"""Importance of coupled groups, from element saliences of one layer's tensors.

A key/value head is coupled with its query heads, its value rows and the output columns that read
it; an MLP channel with a row of gate and up and a column of down. A group's score is the sum of
its elements' saliences over all coupled tensors (LLM-Pruner, arXiv 2305.11627, section 3.2).
"""

from collections.abc import Callable, Iterable

import torch

from loram_cli.arch.spec import PRUNED_AXES, Axis, Family, LayerGeometry, LinearModule

LayerScores = dict[str, torch.Tensor]
"""``key_value``: shape (num_key_value_heads,); ``intermediate``: shape (intermediate_size,)."""

SalienceSums = tuple[torch.Tensor, torch.Tensor]
"""Saliences of a weight summed per row, shape (rows,), and per column, shape (columns,)."""


def taylor_salience(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """First-order Taylor salience of each element, ``|w * dL/dw|`` (LLM-Pruner, eq. 5)."""
    return (weight.float() * gradient.float()).abs()


def l2_sums(chunks: Iterable[torch.Tensor]) -> SalienceSums:
    """Sums of squared magnitudes, which rank groups by their L2 norm.

    Args:
        chunks: A weight's rows in order, some at a time, each of shape (rows, columns).

    Returns:
        Sums per row and per column of the whole weight; rows are added up in float32 (a few
        thousand elements, summed in a cascade), chunks in float64.
    """
    by_row, by_column = [], torch.zeros((), dtype=torch.float64)
    # One buffer for all chunks: the small sums, which stay, would lie between new ones, and the
    # allocator could use none of the space again.
    buffer = torch.empty(0)
    for chunk in chunks:
        if buffer.numel() < chunk.numel():
            buffer = torch.empty(chunk.numel())
        squares = buffer[: chunk.numel()].view(chunk.shape).copy_(chunk).square_()
        by_row.append(squares.sum(dim=1).double())
        by_column = by_column + squares.sum(dim=0).double()
    return torch.cat(by_row), by_column


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

    def sums(module: LinearModule) -> SalienceSums:
        elements = salience(module)
        return (
            elements.sum(dim=1, dtype=torch.float64),
            elements.sum(dim=0, dtype=torch.float64),
        )

    return layer_scores_from_sums(family, layer, sums)


def layer_scores_from_sums(
    family: Family, layer: LayerGeometry, sums: Callable[[LinearModule], SalienceSums]
) -> LayerScores:
    """The same from sums per row and per column, which need no matrix of saliences."""
    scores = {
        "key_value": torch.zeros(layer.num_key_value_heads, dtype=torch.float64),
        "intermediate": torch.zeros(layer.intermediate_size, dtype=torch.float64),
    }
    for module in scored_modules(family, layer):
        by_row, by_column = sums(module)
        if module.interleaved:
            heads = by_row.reshape(layer.num_key_value_heads, -1)
            scores["key_value"] += heads.sum(dim=1)
        else:
            _add_segments(scores, module.rows, layer, by_row)
        _add_segments(scores, module.columns, layer, by_column)
    return scores


def scored_modules(family: Family, layer: LayerGeometry) -> tuple[LinearModule, ...]:
    """The modules of a layer that pruning cuts, whose saliences make the scores.

    Args:
        family: Of the model.
        layer: The layer's widths before pruning.
    """
    return tuple(
        module
        for module in family.layer_modules(layer)
        if not PRUNED_AXES.isdisjoint((*module.rows, *module.columns))
    )


def _add_segments(
    scores: LayerScores, axes: tuple[Axis, ...], layer: LayerGeometry, sums: torch.Tensor
) -> None:
    start = 0
    for axis in axes:
        units = layer.axis_units(axis)
        start += units
        if axis not in PRUNED_AXES:
            continue
        kind = "intermediate" if axis == "intermediate" else "key_value"
        groups = scores[kind].shape[0]
        scores[kind] += sums[start - units : start].reshape(groups, -1).sum(dim=1)
