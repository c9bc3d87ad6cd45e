"""Which layers are loaded, when, and how many are held."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loram_cli.modeling.layer_feed import LayerFeed, Readers, WeightSource
from loram_cli.modeling.skeleton import SkeletonModel, Weight


class Loads:
    """A source that tells what it is asked for."""

    def __init__(self):
        self.order, self.failing, self.there, self.closed = [], set(), set(), False
        self.brought = []

    def ready(self, index):
        assert index in self.there

    def release(self, index):
        self.there.discard(index)

    def close(self):
        self.closed = not self.there

    def load(self, index, whole=True):
        self.order.append(index)
        self.there.add(index)
        assert len(self.there) <= 2
        if index in self.failing:
            raise RuntimeError(f"layer {index} cannot be read")
        return [Weight(torch.full((1,), float(index)))]

    def bring_experts(self, index, wanted, weights):
        assert weights[0].data.item() == index
        self.brought.append((index, wanted))


@pytest.fixture
def fed():
    loads = Loads()
    with ThreadPoolExecutor(1) as thread:
        feed = LayerFeed(loads, thread)
        yield loads, feed
        feed.close()
        assert loads.closed


def test_the_next_layer_is_loaded_meanwhile_and_what_is_held_is_not_loaded_again(fed):
    loads, feed = fed
    for index, then in [(0, 1), (1, 2), (2, 1), (1, 0), (0, 1), (1, 2)]:
        assert feed.take(index, then)[0].data.item() == index
    feed.take(2)
    assert loads.order == [0, 1, 2, 0, 2]


def test_a_layer_without_experts_is_loaded_again_where_all_of_it_is_wanted(fed):
    loads, feed = fed
    feed.take(0, 1, whole=False)
    feed.bring_experts(0, [2, 5])
    feed.take(1, 0)
    assert loads.order == [0, 1, 1]
    # The one that is there whole is used, and nothing of it is brought.
    feed.take(1, 0, whole=False)
    feed.bring_experts(1, [3])
    assert loads.order == [0, 1, 1] and loads.brought == [(0, [2, 5])]


def test_what_failed_ahead_is_tried_again_at_its_turn(fed):
    loads, feed = fed
    loads.failing = {1}
    feed.take(0, 1)
    with pytest.raises(RuntimeError, match="layer 1 cannot be read"):
        feed.take(1, 2)
    loads.failing = set()
    assert feed.take(1, 2)[0].data.item() == 1


def test_layers_are_kept_in_memory_as_far_as_it_goes(base, monkeypatch):
    skeleton = SkeletonModel(base, dtype=torch.float32, device="cpu")
    slots = [slots for _, slots in skeleton.layers()]
    layer_bytes = sum(slot.num_bytes for slot in slots[0])
    read = []

    def reading(slot, reader):
        read.append(slot.tensor)
        return Weight(torch.zeros(slot.shape))

    monkeypatch.setattr(skeleton, "read", reading)
    source = WeightSource(
        skeleton, slots, readers=Readers(None, None, None), host_bytes=int(2.5 * layer_bytes)
    )
    for _ in range(2):
        for index in range(4):
            source.load(index)
    names = [[slot.tensor for slot in each] for each in slots]
    assert read == [name for each in (*names, *names[2:]) for name in each]
    assert source.loaded_bytes == 8 * layer_bytes
