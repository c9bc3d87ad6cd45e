"""Which groups stay, once it is known how many and how they score."""

from collections.abc import Mapping

import torch

from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.scores import LayerScores


def keep_global(
    scores: Mapping[int, LayerScores],
    params_per_group: Mapping[int, Mapping[str, int]],
    remove_params: int,
    multiple_of: int = 1,
) -> dict[int, LayerKeep]:
    """Rank the groups of all layers together, and drop the least important until enough is gone.

    A key/value group holds many times the parameters of an MLP channel, so a group is ranked by
    its score for each parameter that dropping it frees: what is lost is then least for the
    parameters that must go. Scores of different layers are compared as they are. First-order
    Taylor scores all estimate the change of one loss, which makes them comparable; squared
    magnitudes per parameter are comparable as far as the layers' weights are alike in scale.

    Args:
        scores: Group scores of every layer that is pruned.
        params_per_group: Per layer and axis, the parameters that dropping one group frees; what
            is absent stays whole.
        remove_params: How many must go; at least as many do, unless every layer is down to one
            head and one channel before. Ties go to the lower layer, heads first, lower index.
        multiple_of: Channels of a layer go so many at a time, ranked by their mean, so that what
            stays is a multiple of it.

    Returns:
        What stays of each layer: at least one key/value head, and ``multiple_of`` channels.
    """
    places = [(i, kind) for i in sorted(scores) for kind in ("key_value", "intermediate")]
    whole = {p: tuple(range(len(scores[p[0]][p[1]]))) for p in places}
    places = [(i, kind) for i, kind in places if kind in params_per_group[i]]
    ascending, blocks, means = {}, {}, []
    for place in places:
        i, kind = place
        block = multiple_of if kind == "intermediate" else 1
        # Of equal groups the last go first, as in a ranking within a layer: hence the flips.
        values, order = torch.sort(scores[i][kind].flip(0), stable=True)
        ascending[place] = len(values) - 1 - order
        odd = len(values) % block
        blocks[place] = [odd] * (odd > 0) + [block] * (len(values) // block)
        if odd:
            means.append(values[:odd].mean()[None] / params_per_group[i][kind])
        means.append(values[odd:].view(-1, block).mean(1) / params_per_group[i][kind])
    owners = [place for place in places for _ in blocks[place]]
    dropped = dict.fromkeys(places, 0)
    removed = 0
    for position in torch.sort(torch.cat(means), stable=True).indices.tolist():
        if removed >= remove_params:
            break
        i, kind = place = owners[position]
        if dropped[place] < len(blocks[place]) - 1:
            removed += blocks[place][dropped[place]] * params_per_group[i][kind]
            dropped[place] += 1
    kept = whole | {
        place: tuple(sorted(ascending[place][sum(blocks[place][: dropped[place]]) :].tolist()))
        for place in places
    }
    return {i: LayerKeep(kept[i, "key_value"], kept[i, "intermediate"]) for i in scores}
