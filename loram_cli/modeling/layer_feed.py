"""Weights of decoder layers that come when they are needed: where from, and the next one ahead."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

import torch

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.skeleton import SkeletonModel, Slot, Weight


class WeightSource:
    """Decoder layers as weights on the model's device: from the machine's memory or the checkpoint.

    Args:
        skeleton: The model.
        layers: What each layer is filled with, by its index.
        reader: Of the checkpoint.
        host_bytes: Memory of the machine for copies in the form that the device holds (pinned
            where that is a GPU). The first layers to be loaded take it; 0 reads from the
            checkpoint each time, as where the processor itself computes.

    Attributes:
        loaded_bytes: Bytes of weights that were brought so far, in the device's form.
    """

    def __init__(
        self,
        skeleton: SkeletonModel,
        layers: Sequence[Sequence[Slot]],
        reader: TensorReader,
        host_bytes: int = 0,
    ) -> None:
        self._skeleton, self._layers, self._reader = skeleton, layers, reader
        self._free_bytes = host_bytes
        self._host: dict[int, list[Weight]] = {}
        self.loaded_bytes = 0

    def load(self, index: int) -> list[Weight]:
        """A layer's weights, in its slots' order.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        slots = self._layers[index]
        layer_bytes = sum(slot.num_bytes for slot in slots)
        self.loaded_bytes += layer_bytes
        device = self._skeleton.device
        if index in self._host:
            return [_moved(weight, device) for weight in self._host[index]]
        weights = [self._skeleton.read(slot, self._reader) for slot in slots]
        if layer_bytes <= self._free_bytes:
            self._free_bytes -= layer_bytes
            pin = torch.device(device).type == "cuda"
            self._host[index] = [_moved(weight, "cpu", pin=pin) for weight in weights]
        return weights


class LayerFeed:
    """Holds the layer that is at work and the one that comes next, which is loaded meanwhile.

    Args:
        load: Gives a layer's weights, see :meth:`WeightSource.load`.
        thread: Runs it ahead of time; one thread, so that layers come one after the other.
    """

    def __init__(self, load: Callable[[int], list[Weight]], thread: Executor) -> None:
        self._load, self._thread = load, thread
        self._held: dict[int, Future[list[Weight]]] = {}

    def take(self, index: int, then: int | None = None) -> list[Weight]:
        """A layer's weights; whatever is neither it nor the next one is given up first.

        Args:
            index: The layer.
            then: The layer that is needed after it.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        for other in self._held.keys() - {index, then}:
            self._drop(other)
        ahead = self._held.get(index)
        if ahead is None or ahead.exception() is not None:
            # What failed ahead of its turn is tried again.
            ahead = self._held[index] = self._thread.submit(self._load, index)
        weights = ahead.result()
        if then is not None and then not in self._held:
            self._held[then] = self._thread.submit(self._load, then)
        return weights

    def forget(self) -> None:
        """Give up what is held, and wait for what is on its way."""
        for index in list(self._held):
            self._drop(index)

    def _drop(self, index: int) -> None:
        ahead = self._held.pop(index)
        if not ahead.cancel():
            ahead.exception()  # waits for its end


def _moved(weight: Weight, device: str, *, pin: bool = False) -> Weight:
    data, state = weight.data.to(device), weight.quant_state
    if pin:
        data = data.pin_memory()
    if state is not None:
        # Its own way to another device changes it.
        state = copy.copy(state)
        state.state2 = copy.copy(state.state2)
        state.to(device)
    return Weight(data, state)
