"""Which experts of a mixture stay: how many, and which, from their importance.

Experts are whole MLPs that a router picks among, so one can go with its row of the router and
nothing else changes shape. Their importance is how much they add to a layer's output: REAP's
router-weighted activation norm (Lasby et al., "REAP the Experts", arXiv 2510.13999, eq. 9), how
often they are picked, or how much the loss would change without them (Taylor).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from loram_cli.arch.spec import LayerGeometry
from loram_cli.errors import UsageError
from loram_cli.pruning.groups import with_experts

if TYPE_CHECKING:
    import torch

ExpertImportance = Literal["reap", "frequency", "taylor", "rand"]

# 0.95 * 20 is 18.999999999999996 in binary floating point; floor must still give 19.
_EPSILON = 1e-9


def experts_left(layer: LayerGeometry, ratio: float) -> int:
    """How many experts of a layer stay: equally many in each of the router's groups.

    Args:
        layer: The layer's widths before pruning.
        ratio: Share of its experts that goes.

    Raises:
        UsageError: Nothing would be left for the router to pick among.
    """
    groups = layer.expert_groups
    each = layer.num_experts // groups
    left = each - math.floor(each * ratio + _EPSILON)
    # A router in groups ranks them by the best two experts of each.
    least = 2 if groups > 1 else 1
    if left < least:
        raise UsageError(
            f"--experts-ratio {ratio} leaves {left} of {each} experts"
            + (f" in each of {groups} groups, and the router needs 2" if groups > 1 else ""),
            "pass a lower --experts-ratio",
        )
    return left * groups


def without_experts(
    layers: tuple[LayerGeometry, ...], ratio: float, family: str
) -> tuple[LayerGeometry, ...]:
    """Widths once a share of every layer's experts is gone.

    Args:
        layers: The widths before.
        ratio: The share.
        family: Named in the error.

    Raises:
        UsageError: There are no experts, or none or all would go.
    """
    if not any(layer.has_experts for layer in layers):
        raise UsageError(
            f"--experts-ratio: models of the family {family} have no experts",
            "pass --ratio, which drops heads and channels",
        )
    after = tuple(
        with_experts(layer, experts_left(layer, ratio)) if layer.has_experts else layer
        for layer in layers
    )
    if after == layers:
        count = max(layer.num_experts for layer in layers)
        raise UsageError(
            f"--experts-ratio {ratio} drops none of {count} experts", "pass a higher one"
        )
    return after


def draw_experts(layer: LayerGeometry, count: int, *, seed: int, index: int) -> tuple[int, ...]:
    """Experts drawn uniformly, from a generator of this layer's own."""
    import torch

    # Apart from the draw of the layer's heads and channels.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 31 + 7)
    return keep_experts(layer, torch.rand(layer.num_experts, generator=generator), count)


def keep_experts(layer: LayerGeometry, scores: "torch.Tensor", count: int) -> tuple[int, ...]:
    """The experts of a layer that score highest, equally many of each group.

    Args:
        layer: The layer's widths before pruning.
        scores: Shape (num_experts,); ties go to the lower index.
        count: How many stay, a multiple of the groups.

    Returns:
        Sorted indices.
    """
    groups = layer.expert_groups
    width, each = layer.num_experts // groups, count // groups
    kept: list[int] = []
    for group, part in enumerate(scores.reshape(groups, width)):
        order = part.sort(descending=True, stable=True).indices[:each]
        kept += (group * width + order).tolist()
    return tuple(sorted(kept))


def keep_experts_globally(
    layers: Mapping[int, LayerGeometry], scores: Mapping[int, "torch.Tensor"], ratio: float
) -> dict[int, tuple[int, ...]]:
    """Rank the experts of all layers together; all experts are of one size.

    A score counts by its share of its layer's sum, since later layers' activations are larger. A
    layer keeps at least as many as a token has.

    Args:
        layers: Widths before pruning of the layers with experts, whose routers have one group.
        scores: Of each layer's experts, shape (num_experts,).
        ratio: Share of all experts that goes.

    Returns:
        Sorted indices of what stays of each layer.
    """
    shares = {i: score / score.sum().clamp_min(1e-30) for i, score in scores.items()}
    kept: dict[int, list[int]] = {}
    for i, layer in layers.items():
        order = shares[i].sort(descending=True, stable=True).indices.tolist()
        kept[i] = order[: max(1, layer.top_k)]
    wanted = sum(experts_left(layer, ratio) for layer in layers.values())
    others = sorted(
        (
            (-float(shares[i][expert]), i, expert)
            for i, layer in layers.items()
            for expert in set(range(layer.num_experts)) - set(kept[i])
        )
    )
    for _, i, expert in others[: max(0, wanted - sum(map(len, kept.values())))]:
        kept[i].append(expert)
    return {i: tuple(sorted(experts)) for i, experts in kept.items()}
