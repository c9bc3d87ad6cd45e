"""Weights of decoder layers that come when they are needed: where from, and the next one ahead."""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.copies import Copies
from loram_cli.modeling.layer_buffers import Layout, buffer_bytes, write_weights
from loram_cli.modeling.skeleton import SkeletonModel, Slot, Weight, fill
from loram_cli.reporting import Reporter


@dataclass(frozen=True)
class Readers:
    """Of one checkpoint.

    Attributes:
        layers: For whole layers, which come from the first to the last.
        outside: For what layers hold beside experts that only tokens bring.
        experts: For those, from the thread that computes.
    """

    layers: TensorReader
    outside: TensorReader
    experts: TensorReader


class LayerSource(Protocol):
    """Gives layers by their index. The feed asks for no more than two at a time."""

    @property
    def loaded_bytes(self) -> int:
        """Bytes of weights that were brought so far, in the device's form."""

    def load(self, index: int, whole: bool = True) -> list[Weight]:
        """A layer's weights, in its slots' order; called by the feed's thread.

        Args:
            index: The layer.
            whole: Whether experts are to have values.
        """

    def bring_experts(self, index: int, wanted: Sequence[int], weights: Sequence[Weight]) -> None:
        """Give some experts of a layer their values, which is ready; called by what computes.

        Args:
            index: The layer.
            wanted: Rising indices of the experts.
            weights: From :meth:`load`; filled there.
        """

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
        readers: Of the checkpoint.
        host_bytes: Memory of the machine for copies in the form that the device holds. The first
            layers to be loaded take it; 0 reads from the checkpoint each time.
    """

    def __init__(
        self,
        skeleton: SkeletonModel,
        layers: Sequence[Sequence[Slot]],
        readers: Readers,
        host_bytes: int = 0,
    ) -> None:
        self._skeleton, self._layers, self._readers = skeleton, layers, readers
        self._free_bytes = host_bytes
        self._host: dict[int, list[Weight]] = {}
        self._layers_bytes = self._experts_bytes = 0

    @property
    def loaded_bytes(self) -> int:
        """Bytes of weights that were brought so far, in the device's form."""
        return self._layers_bytes + self._experts_bytes

    def load(self, index: int, whole: bool = True) -> list[Weight]:
        """A layer's weights, in its slots' order; of one in the machine's memory always all.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        slots, kept = self._layers[index], self._host.get(index)
        self._layers_bytes += _num_bytes(slots, whole or kept is not None)
        if kept is not None:
            return [_moved(weight, self._skeleton.device) for weight in kept]
        if not whole:
            reader = self._readers.outside
            return [
                self._skeleton.unread(slot) if slot.experts else self._skeleton.read(slot, reader)
                for slot in slots
            ]
        weights = [self._skeleton.read(slot, self._readers.layers) for slot in slots]
        if _num_bytes(slots) <= self._free_bytes:
            self._free_bytes -= _num_bytes(slots)
            self._host[index] = [_moved(weight, "cpu") for weight in weights]
        return weights

    def bring_experts(self, index: int, wanted: Sequence[int], weights: Sequence[Weight]) -> None:
        """Read some experts of a layer, but for one that came from the machine's memory.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        if index not in self._host:
            slots = self._layers[index]
            _read_experts(self._skeleton, slots, self._readers.experts, wanted, weights)
            self._experts_bytes += _experts_bytes(slots, len(wanted))

    def ready(self, index: int) -> None:
        """Nothing to wait for: what computes and what loads do so in one order."""

    def release(self, index: int) -> None:
        """Nothing to do: storage goes with its last user."""

    def close(self) -> None:
        """Give up the copies."""
        self._host.clear()


@dataclass(frozen=True)
class _Kept:
    """A layer in the machine's memory.

    Attributes:
        host: Its buffer.
        layout: Where its weights lie there.
        experts: Those that have values there.
    """

    host: torch.Tensor
    layout: Layout
    experts: set[int]


class BufferedSource:
    """Layers that are copied to a GPU while it computes, into two buffers that take turns.

    A layer's weights are views of the buffer that it was copied into. Events keep the order: the
    computation waits for the copy, and the next copy into the same buffer for the computation.
    Single experts are copied by the computation itself, into the place that their layer has for
    them.

    Args:
        skeleton: The model.
        layers: What each layer is filled with, by its index.
        readers: Of the checkpoint.
        copies: How they get to the device.
        host_bytes: As for :class:`WeightSource`; the copies there are pinned.
    """

    def __init__(
        self,
        skeleton: SkeletonModel,
        layers: Sequence[Sequence[Slot]],
        readers: Readers,
        copies: Copies,
        host_bytes: int = 0,
    ) -> None:
        self._skeleton, self._layers, self._readers = skeleton, layers, readers
        self._copies, self._free_bytes = copies, host_bytes
        self._host: dict[int, _Kept] = {}
        self._pinned: list[torch.Tensor] = []
        self._num_bytes = max(map(buffer_bytes, layers))
        # Buffers that no layer is in, each with the computation that read it last.
        self._idle: list[tuple[torch.Tensor, Any]] = []
        self._taken: dict[int, torch.Tensor] = {}
        self._copied: dict[int, Any] = {}
        self._layers_bytes = self._experts_bytes = 0

    @property
    def loaded_bytes(self) -> int:
        """Bytes of weights that were brought so far, in the device's form."""
        return self._layers_bytes + self._experts_bytes

    def load(self, index: int, whole: bool = True) -> list[Weight]:
        """A layer's weights, in its slots' order; their copy may still be under way.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        slots, kept = self._layers[index], self._host.get(index)
        buffer, free = self._idle.pop() if self._idle else self._new_buffer()
        self._taken[index] = buffer
        with self._copies.stream(free):
            if kept is not None and not (whole and kept.experts != _all_experts(slots)):
                layout = kept.layout
                count = layout.num_bytes if whole else _start_of_experts(slots, layout)
                buffer[:count].copy_(kept.host[:count], non_blocking=True)
            else:
                layout = write_weights(self._read(slots, whole), buffer)
                self._keep(index, buffer, layout, whole)
            weights = layout.views(buffer)
            self._copied[index] = self._copies.copied()
        self._layers_bytes += _num_bytes(slots, whole)
        return weights

    def bring_experts(self, index: int, wanted: Sequence[int], weights: Sequence[Weight]) -> None:
        """Copy some experts of a layer from the machine's memory, and read those absent there.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        slots, kept = self._layers[index], self._host.get(index)
        reader = self._readers.experts
        if kept is None:
            _read_experts(self._skeleton, slots, reader, wanted, weights)
        else:
            copies = kept.layout.views(kept.host)
            new = [expert for expert in wanted if expert not in kept.experts]
            if new:
                _read_experts(self._skeleton, slots, reader, new, copies)
                kept.experts.update(new)
            for slot, weight, copy_of in zip(slots, weights, copies, strict=True):
                for expert in wanted if slot.experts else ():
                    weight.data[expert].copy_(copy_of.data[expert], non_blocking=True)
        self._experts_bytes += _experts_bytes(slots, len(wanted))

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

    def _read(self, slots: Sequence[Slot], whole: bool) -> Iterator[Weight]:
        reader = self._readers.layers if whole else self._readers.outside
        for slot in slots:
            if slot.experts and not whole:
                yield self._skeleton.unread(slot, "meta")
            else:
                yield self._skeleton.read(slot, reader)

    def _keep(self, index: int, buffer: torch.Tensor, layout: Layout, whole: bool) -> None:
        """Keep what was read in the machine's memory, with room for the layer's other experts."""
        if index not in self._host:
            if layout.num_bytes > self._free_bytes:
                return
            self._free_bytes -= layout.num_bytes
            host = torch.empty(layout.num_bytes, dtype=torch.uint8)
            if self._copies.pin(host):
                self._pinned.append(host)
            self._host[index] = _Kept(host, layout, set())
        slots, kept = self._layers[index], self._host[index]
        count = layout.num_bytes if whole else _start_of_experts(slots, layout)
        kept.host[:count].copy_(buffer[:count])
        if whole:
            kept.experts.update(_all_experts(slots))


class LayerFeed:
    """Holds the layer that is at work and the one that comes next, which is loaded meanwhile.

    Args:
        source: Where they come from.
        thread: Loads ahead of time; one thread, so that layers come one after the other.
    """

    def __init__(self, source: LayerSource, thread: Executor) -> None:
        self._source, self._thread = source, thread
        self._held: dict[int, Future[list[Weight]]] = {}
        # Those of them whose experts have no values but what is brought by itself.
        self._partial: set[int] = set()

    def take(self, index: int, then: int | None = None, *, whole: bool = True) -> list[Weight]:
        """A layer's weights; whatever is neither it nor the next one is given up first.

        Args:
            index: The layer.
            then: The layer that is needed after it.
            whole: Whether their experts are to have values; else :meth:`bring_experts` is to be
                called before they are run.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        for other in self._held.keys() - {index, then}:
            self._drop(other)
        if index in self._held and self._held[index].exception() is not None:
            # What failed ahead of its turn is tried again.
            self._drop(index)
        if index in self._partial and whole:
            self._drop(index)
        self._ask_for(index, whole)
        weights = self._held[index].result()
        self._source.ready(index)
        if then is not None:
            self._ask_for(then, whole)
        return weights

    def bring_experts(self, index: int, wanted: Sequence[int]) -> None:
        """Give some experts their values, of a layer that was taken; nothing where all have them.

        Args:
            index: The layer.
            wanted: Rising indices of the experts.

        Raises:
            LoramError: A tensor is absent or of another shape.
        """
        if index in self._partial:
            self._source.bring_experts(index, wanted, self._held[index].result())

    def close(self) -> None:
        """Give up what is held, and wait for what is on its way."""
        for index in list(self._held):
            self._drop(index)
        self._source.close()

    def _ask_for(self, index: int, whole: bool) -> None:
        if index not in self._held:
            self._held[index] = self._thread.submit(self._source.load, index, whole)
            if not whole:
                self._partial.add(index)

    def _drop(self, index: int) -> None:
        ahead = self._held.pop(index)
        self._partial.discard(index)
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
        opened = [TensorReader(skeleton.index, often=each) for each in (False, True, True)]
        readers = Readers(*map(stack.enter_context, opened))
        with reporter.progress("load", sum(s.num_bytes for s in now) / 2**20, "MiB") as progress:
            for slot in now:
                fill(slot, skeleton.read(slot, readers.layers))
                progress.advance(slot.num_bytes / 2**20)
        thread = stack.enter_context(ThreadPoolExecutor(1, "layers"))
        source: LayerSource = WeightSource(skeleton, layers, readers, host_bytes)
        if copies is not None and layers:
            source = BufferedSource(skeleton, layers, readers, copies, host_bytes)
        feed = LayerFeed(source, thread)
        # What is under way ends before the thread does, and that before files are closed.
        stack.callback(feed.close)
        yield source, feed


def _num_bytes(slots: Sequence[Slot], whole: bool = True) -> int:
    return sum(slot.num_bytes for slot in slots if whole or not slot.experts)


def _all_experts(slots: Sequence[Slot]) -> set[int]:
    return set(range(max((slot.experts for slot in slots), default=0)))


def _start_of_experts(slots: Sequence[Slot], layout: Layout) -> int:
    """Bytes of a buffer before its experts, which stand last."""
    return layout.start_of(sum(not slot.experts for slot in slots))


def _experts_bytes(slots: Sequence[Slot], count: int) -> int:
    """What so many experts of a layer take."""
    return sum(slot.num_bytes // slot.experts * count for slot in slots if slot.experts)


def _read_experts(
    skeleton: SkeletonModel,
    slots: Sequence[Slot],
    reader: TensorReader,
    wanted: Sequence[int],
    weights: Sequence[Weight],
) -> None:
    for slot, weight in zip(slots, weights, strict=True):
        if slot.experts:
            skeleton.read_experts(slot, reader, wanted, weight.data)


def _moved(weight: Weight, device: str) -> Weight:
    state = weight.quant_state
    if state is not None:
        # Its own way to another device changes it.
        state = copy.copy(state)
        state.state2 = copy.copy(state.state2)
        state.to(device)
    return Weight(weight.data.to(device), state)
