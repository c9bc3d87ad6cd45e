"""Which groups stay, once it is known how many and how they score."""

import bisect
import itertools
from collections.abc import Mapping

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


def keep_global(
    scores: Mapping[int, LayerScores],
    params_per_group: Mapping[int, Mapping[str, int]],
    remove_params: int,
) -> dict[int, LayerKeep]:
    """Rank the groups of all layers together, and drop the least important until enough is gone.

    A key/value group holds many times the parameters of an MLP channel, so a group is ranked by
    its score for each parameter that dropping it frees: what is lost is then least for the
    parameters that must go. Scores of different layers are compared as they are. First-order
    Taylor scores all estimate the change of one loss, which makes them comparable; squared
    magnitudes per parameter are comparable as far as the layers' weights are alike in scale.

    Args:
        scores: Group scores of every layer that is pruned.
        params_per_group: Per layer and axis, the parameters that dropping one group frees.
        remove_params: How many must go; at least as many do, unless every layer is down to one
            head and one channel before. Ties go to the lower layer, heads first, lower index.

    Returns:
        What stays of each layer: at least one key/value head and one channel.
    """
    # Of equal groups the last go first, as in a ranking within a layer: hence the flips.
    places = [(i, kind) for i in sorted(scores) for kind in ("key_value", "intermediate")]
    values = [(scores[i][kind] / params_per_group[i][kind]).flip(0) for i, kind in places]
    starts = [0, *itertools.accumulate(len(value) for value in values)]
    order = torch.sort(torch.cat(values), stable=True).indices
    kept = [torch.ones(len(value), dtype=torch.bool) for value in values]
    left = [len(value) for value in values]
    removed = 0
    for position in order.tolist():
        if removed >= remove_params:
            break
        place = bisect.bisect_right(starts, position) - 1
        if left[place] > 1:
            kept[place][position - starts[place]] = False
            left[place] -= 1
            i, kind = places[place]
            removed += params_per_group[i][kind]
    indices = {
        place: tuple(keep.flip(0).nonzero().flatten().tolist())
        for place, keep in zip(places, kept, strict=True)
    }
    return {i: LayerKeep(indices[i, "key_value"], indices[i, "intermediate"]) for i in scores}


def _highest(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))
