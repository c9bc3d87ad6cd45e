"""Which groups stay, once it is known how many and how they score."""

import torch

from loram_cli.arch.spec import LayerGeometry
from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.scores import LayerScores


def keep_highest(scores: LayerScores, after: LayerGeometry) -> LayerKeep:
    """Keep the groups with the highest scores; ties go to the lower index.

    Args:
        scores: Group scores of the layer.
        after: The layer's widths after pruning, i.e. how many to keep.
    """
    return LayerKeep(
        _highest(scores["key_value"], after.num_key_value_heads),
        _highest(scores["intermediate"], after.intermediate_size),
    )


def keep_random(before: LayerGeometry, after: LayerGeometry, seed: int, layer: int) -> LayerKeep:
    """Keep groups drawn uniformly, from a generator of this layer's own.

    Args:
        before: The layer's widths before pruning.
        after: The layer's widths after pruning.
        seed: The run's seed.
        layer: Layer index; it enters the seed, so that a layer's draw depends on no other.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    heads = torch.randperm(before.num_key_value_heads, generator=generator)
    channels = torch.randperm(before.intermediate_size, generator=generator)
    return LayerKeep(
        tuple(sorted(heads[: after.num_key_value_heads].tolist())),
        tuple(sorted(channels[: after.intermediate_size].tolist())),
    )


def _highest(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))
