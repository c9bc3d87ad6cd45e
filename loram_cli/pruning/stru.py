"""Strategy ``stru``: the groups that score highest stay."""

from typing import TYPE_CHECKING

from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.strategy import LayerToPrune, Strategy

if TYPE_CHECKING:
    import torch


def keep_highest(layer: LayerToPrune) -> LayerKeep:
    """Keep the groups with the highest scores; ties go to the lower index."""
    assert layer.scores is not None
    return LayerKeep(
        _highest(layer.scores["key_value"], layer.after.num_key_value_heads),
        _highest(layer.scores["intermediate"], layer.after.intermediate_size),
    )


def _highest(scores: "torch.Tensor", count: int) -> tuple[int, ...]:
    order = scores.sort(descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


STRATEGY = Strategy(
    summary="ranked groups",
    ratio=0.65,
    paper_ratios=(0.65, 0.75, 0.85, 0.95),
    importances=("taylor", "l2", "wanda", "obs"),
    keep=keep_highest,
)
