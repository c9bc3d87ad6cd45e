"""Weights of decoder layers that come when they are needed: where from, and the next one ahead."""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.copies import Copies
from loram_cli.modeling.layer_buffers import Layout, buffer_bytes, write_weights
from loram_cli.modeling.skeleton import SkeletonModel, Slot, Weight, fill
from loram_cli.reporting import Reporter


class LayerSource(Protocol):
    """Gives layers by their index. The feed asks for no more than two at a time."""

    loaded_bytes: int

    def load(self, index: int) -> list[Weight]:
        """A layer's weights, in its slots' order; called by the feed's thread."""

    def ready(self, index: int) -> None:
        """The computation is about to read the layer, which has been loaded."""

    def release(self, index: int) -> None:
        """The computation has been asked for all that reads the layer."""

    def close(self) -> None:
        """Give up what is kept."""


class WeightSource:
    """Layers from the checkpoint, or copies in the machine's memory: where the processor computes.

    Args:
        skeleton: The model.
        layers: What each layer is filled with, by its index.
        reader: Of the checkpoint.
        host_bytes: Memory of the machine for copies in the form that the device holds. The first
            layers to be loaded take it; 0 reads from the checkpoint each time.

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
        if index in self._host:
            return [_moved(weight, self._skeleton.device) for weight in self._host[index]]
        weights = [self._skeleton.read(slot, self._reader) for slot in slots]
        if layer_bytes <= self._free_bytes:
            self._free_bytes -= layer_bytes
            self._host[index] = [_moved(weight, "cpu") for weight in weights]
        return weights

    def ready(self, index: int) -> None:
        """Nothing to wait for: what computes and what loads do so in one order."""

    def release(self, index: int) -> None:
        """Nothing to do: storage goes with its last user."""

    def close(self) -> None:
        """Give up the copies."""
        self._host.clear()


class BufferedSource:
    """Layers that are copied to a GPU while it computes, into two buffers that take turns.

    A layer's weights are views of the buffer that it was copied into. Events keep the order: the
    computation waits for the copy, and the next copy into the same buffer for the computation.

    Args:
        skeleton: The model.
        layers: What each layer is filled with, by its index.
        reader: Of the checkpoint.
        copies: How they get to the device.
        host_bytes: As for :class:`WeightSource`; the copies there are pinned.

    Attributes:
        loaded_bytes: As for :class:`WeightSource`.
    """

    def __init__(
        self,
        skeleton: SkeletonModel,
        layers: Sequence[Sequence[Slot]],
        reader: TensorReader,
        copies: Copies,
        host_bytes: int = 0,
    ) -> None:
        self._skeleton, self._layers, self._reader = skeleton, layers, reader
        self._copies, self._free_bytes = copies, host_bytes
        self._host: dict[int, tuple[torch.Tensor, Layout]] = {}
        self._pinned: list[torch.Tensor] = []
        self._num_bytes = max(map(buffer_bytes, layers))
        # Buffers that no layer is in, each with the computation that read it last.
        self._idle: list[tuple[torch.Tensor, Any]] = []
        self._taken: dict[int, torch.Tensor] = {}
        self._copied: dict[int, Any] = {}
        self.loaded_bytes = 0

    def load(self, index: int) -> list[Weight]:
        """A layer's weights, in its slots' order; their copy may still be under way.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        buffer, free = self._idle.pop() if self._idle else self._new_buffer()
        self._taken[index] = buffer
        with self._copies.stream(free):
            if index in self._host:
                host, layout = self._host[index]
                buffer[: len(host)].copy_(host, non_blocking=True)
            else:
                slots = self._layers[index]
                read = (self._skeleton.read(slot, self._reader) for slot in slots)
                layout = write_weights(read, buffer)
                self._keep(index, buffer, layout)
            weights = layout.views(buffer)
            self._copied[index] = self._copies.copied()
        self.loaded_bytes += sum(slot.num_bytes for slot in self._layers[index])
        return weights

    def ready(self, index: int) -> None:
        """Let the computation wait for the layer's copy."""
        self._copies.wait(self._copied[index])

    def release(self, index: int) -> None:
        """Let the next copy into the layer's buffer wait for the computation."""
        self._copied.pop(index, None)
        buffer = self._taken.pop(index, None)
        if buffer is not None:
            self._idle.append((buffer, self._copies.computed()))

    def close(self) -> None:
        """Give up buffers and copies."""
        self._copies.finish()
        for host in self._pinned:
            self._copies.unpin(host)
        self._pinned.clear()
        self._host.clear()
        self._idle.clear()

    def _new_buffer(self) -> tuple[torch.Tensor, Any]:
        # Made on the computing stream, and held to the end: its memory is nobody else's.
        buffer = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._skeleton.device)
        return buffer, self._copies.computed()

    def _keep(self, index: int, buffer: torch.Tensor, layout: Layout) -> None:
        if layout.num_bytes > self._free_bytes:
            return
        self._free_bytes -= layout.num_bytes
        host = torch.empty(layout.num_bytes, dtype=torch.uint8)
        host.copy_(buffer[: layout.num_bytes])
        if self._copies.pin(host):
            self._pinned.append(host)
        self._host[index] = host, layout


class LayerFeed:
    """Holds the layer that is at work and the one that comes next, which is loaded meanwhile.

    Args:
        source: Where they come from.
        thread: Loads ahead of time; one thread, so that layers come one after the other.
    """

    def __init__(self, source: LayerSource, thread: Executor) -> None:
        self._source, self._thread = source, thread
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
        if index in self._held and self._held[index].exception() is not None:
            # What failed ahead of its turn is tried again.
            self._drop(index)
        if index not in self._held:
            self._held[index] = self._thread.submit(self._source.load, index)
        weights = self._held[index].result()
        self._source.ready(index)
        if then is not None and then not in self._held:
            self._held[then] = self._thread.submit(self._source.load, then)
        return weights

    def close(self) -> None:
        """Give up what is held, and wait for what is on its way."""
        for index in list(self._held):
            self._drop(index)
        self._source.close()

    def _drop(self, index: int) -> None:
        ahead = self._held.pop(index)
        if not ahead.cancel():
            ahead.exception()  # waits for its end
        self._source.release(index)


@contextmanager
def fed_layers(
    skeleton: SkeletonModel,
    layers: Sequence[Sequence[Slot]],
    stay: int,
    reporter: Reporter,
    *,
    host_bytes: int = 0,
    copies: Copies | None = None,
) -> Iterator[tuple[LayerSource, LayerFeed]]:
    """Fill all of a model but some layers, and open the way for those, within the block.

    Args:
        skeleton: Not filled yet.
        layers: What each layer that the feed is asked for is filled with, by its index.
        stay: How many of them are filled now, from the first one on.
        reporter: Progress and warnings.
        host_bytes: As for :class:`WeightSource`.
        copies: How layers get to the device while it computes; None copies from pageable memory
            on the stream that computes, or reads them where the processor computes.

    Raises:
        LoramError: A tensor is absent or of another shape.
    """
    later = {slot.tensor for slots in layers[stay:] for slot in slots}
    now = [slot for name, slot in skeleton.slots.items() if name not in later]
    with ExitStack() as stack:
        reader = stack.enter_context(TensorReader(skeleton.index))
        with reporter.progress("load", sum(s.num_bytes for s in now) / 2**20, "MiB") as progress:
            for slot in now:
                fill(slot, skeleton.read(slot, reader))
                progress.advance(slot.num_bytes / 2**20)
        thread = stack.enter_context(ThreadPoolExecutor(1, "layers"))
        source: LayerSource = WeightSource(skeleton, layers, reader, host_bytes)
        if copies is not None and layers:
            source = BufferedSource(skeleton, layers, reader, copies, host_bytes)
        feed = LayerFeed(source, thread)
        # What is under way ends before the thread does, and that before files are closed.
        stack.callback(feed.close)
        yield source, feed


def _moved(weight: Weight, device: str) -> Weight:
    state = weight.quant_state
    if state is not None:
        # Its own way to another device changes it.
        state = copy.copy(state)
        state.state2 = copy.copy(state.state2)
        state.to(device)
    return Weight(weight.data.to(device), state)
