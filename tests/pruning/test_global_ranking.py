import torch

from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.select import keep_global

FREED = {i: {"key_value": 10, "intermediate": 2} for i in range(3)}


def scores_of(heads, channels):
    return {
        i: {
            "key_value": torch.tensor(h, dtype=torch.float64),
            "intermediate": torch.tensor(c, dtype=torch.float64),
        }
        for i, (h, c) in enumerate(zip(heads, channels, strict=True))
    }


def test_groups_go_by_what_they_are_worth_for_each_parameter_freed():
    # A parameter of the head is worth 0.5, those of the channels 0.4, 0.6, 9.
    scores = scores_of([[5.0, 90.0]], [[0.8, 1.2, 18.0]])
    for remove, heads, channels in (
        (1, (0, 1), (1, 2)), (2, (0, 1), (1, 2)), (3, (1,), (1, 2)), (13, (1,), (2,)),
    ):  # fmt: skip
        assert keep_global(scores, FREED, remove) == {0: LayerKeep(heads, channels)}


def test_every_layer_keeps_a_head_and_a_channel():
    scores = scores_of([[0.0, 0.0]] * 3, [[0.0] * 4, [1.0] * 4, [2.0] * 4])
    keep = keep_global(scores, FREED, 10**9)
    assert keep == {i: LayerKeep((0,), (0,)) for i in range(3)}
    assert keep_global(scores, FREED, 0)[2] == LayerKeep((0, 1), (0, 1, 2, 3))


def test_channels_go_in_blocks_and_what_stays_is_a_multiple():
    # Blocks of a layer, least first: the two beyond a multiple of four, then fours.
    channels = [9.0, 0.2, 0.1, 5.0, 5.0, 5.0, 9.0, 9.0, 9.0, 5.0]
    scores = scores_of([[1000.0]], [channels])
    for remove, kept in (
        (0, range(10)), (1, (0, 3, 4, 5, 6, 7, 8, 9)), (4, (0, 3, 4, 5, 6, 7, 8, 9)),
        (5, (0, 6, 7, 8)), (1000, (0, 6, 7, 8)),
    ):  # fmt: skip
        assert keep_global(scores, FREED, remove, 4)[0].intermediate == tuple(kept)
    # A layer with fewer channels stays whole.
    assert keep_global(scores, FREED, 1000, 16)[0].intermediate == tuple(range(10))


def test_it_removes_enough_and_no_more_than_a_group_beyond_and_the_least_worth():
    generator = torch.Generator().manual_seed(0)
    scores = {
        i: {
            "key_value": torch.rand(4, generator=generator, dtype=torch.float64) * 10,
            "intermediate": torch.rand(16, generator=generator, dtype=torch.float64) * 2,
        }
        for i in range(3)
    }
    total = 3 * (4 * 10 + 16 * 2)
    for remove in range(0, 140, 7):
        keep = keep_global(scores, FREED, remove)
        left = sum(10 * len(k.key_value_heads) + 2 * len(k.intermediate) for k in keep.values())
        assert remove <= total - left < remove + 10
        # Whatever stays (unless it is a layer's last) is worth as much as all that went.
        worth = {
            (i, kind, j): value / FREED[i][kind]
            for i, layer in scores.items()
            for kind, values in layer.items()
            for j, value in enumerate(values.tolist())
        }
        kept = {
            key: indices
            for i, k in keep.items()
            for key, indices in (
                ((i, "key_value"), k.key_value_heads), ((i, "intermediate"), k.intermediate),
            )
        }  # fmt: skip
        gone = [w for (i, kind, j), w in worth.items() if j not in kept[i, kind]]
        stays = [
            w for (i, kind, j), w in worth.items() if j in kept[i, kind] and len(kept[i, kind]) > 1
        ]
        assert max(gone, default=0) <= min(stays)
