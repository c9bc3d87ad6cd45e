"""A causal LM that exceeds the memory: some decoder layers have weights only while they run.

The first layers stay, as many as fit. Each of the others is brought when its turn comes, the next
one read meanwhile by a thread, and its weights go when it has run: every forward pass reads them
anew, from the machine's memory where they fit in there, else from the checkpoint. On a GPU they
come from pinned memory on a stream of their own, so that the next layer is copied while this one
runs. What is computed is the same to the bit. accelerate can offload as well, but PEFT (0.21) loads
an adapter onto such a model by writing the checkpoint anew with the factors in it: over the
original where its path is relative, else below the working directory. Hence this way.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError
from loram_cli.modeling.copies import Copies, CudaCopies
from loram_cli.modeling.layer_buffers import Layout, buffer_bytes, write_weights
from loram_cli.modeling.skeleton import SkeletonModel, Slot, Weight, drain, fill
from loram_cli.reporting import Reporter
from loram_cli.units import format_bytes

# One layer runs, the next one is on its way.
_IN_FLIGHT = 2


def weight_bytes(skeleton: SkeletonModel) -> int:
    """What all weights of a model take, and one more that is being turned into its form."""
    return sum(slot.num_bytes for slot in skeleton.slots.values()) + _turned_bytes(skeleton)


def resident_layers(skeleton: SkeletonModel, budget_bytes: int) -> int:
    """How many decoder layers, from the first one on, can stay.

    Args:
        skeleton: Not filled yet.
        budget_bytes: Memory for weights on the device.

    Raises:
        LoramError: Not even what is neither layer nor can be read anew fits, and two layers.
    """
    layers = [sum(slot.num_bytes for slot in slots) for _, slots in skeleton.layers()]
    if weight_bytes(skeleton) <= budget_bytes:
        return len(layers)
    # What is left of the weights beside the layers, and what is turned into its form.
    other = weight_bytes(skeleton) - sum(layers)
    for count in range(len(layers) - 1, -1, -1):
        passing = sorted(layers[count:])[-_IN_FLIGHT:]
        least = other + sum(layers[:count]) + sum(passing)
        if least <= budget_bytes:
            return count
    raise LoramError(
        f"{skeleton.index.directory}: embedding, head and two decoder layers take "
        f"{format_bytes(least)}, and there are {format_bytes(budget_bytes)} for weights"
    )


@contextmanager
def loaded_within(
    skeleton: SkeletonModel,
    stay: int,
    reporter: Reporter,
    *,
    host_bytes: int = 0,
    copies: Copies | Literal["auto"] | None = "auto",
) -> Iterator[None]:
    """Fill a model, all but the last layers; those are brought as they run, within the block.

    After it the model cannot be run any more, and nothing here keeps it.

    Args:
        skeleton: Its model, with any adapters attached.
        stay: Layers that stay, from :func:`resident_layers`.
        reporter: Told of progress.
        host_bytes: Memory of the machine for weights of the others; 0 reads them from the
            checkpoint each time, as where they are run by the processor.
        copies: How layers get to the device while it computes; None copies from pageable memory
            on the stream that computes, and ``auto`` does so on anything but a GPU.

    Raises:
        LoramError: A tensor is absent or of another shape.
    """
    layers = list(skeleton.layers())
    passing = [slots for _, slots in layers[stay:]]
    later = {slot.tensor for slots in passing for slot in slots}
    now = [slot for name, slot in skeleton.slots.items() if name not in later]
    with ExitStack() as stack:
        reader = stack.enter_context(TensorReader(skeleton.index))
        with reporter.progress("load", sum(s.num_bytes for s in now) / 2**20, "MiB") as progress:
            for slot in now:
                fill(slot, skeleton.read(slot, reader))
                progress.advance(slot.num_bytes / 2**20)
        thread = stack.enter_context(ThreadPoolExecutor(1, "layers"))
        if copies == "auto":
            copies = CudaCopies(skeleton.device) if skeleton.device.startswith("cuda") else None
        stream: _Stream | _OverlappedStream
        if copies is None or not passing:
            stream = _Stream(skeleton, passing, reader, thread, host_bytes)
        else:
            stream = _OverlappedStream(skeleton, passing, reader, thread, host_bytes, copies)
        # What is under way ends before the thread does, and that before files are closed.
        stack.callback(stream.close)
        for position, (layer, _) in enumerate(layers[stay:]):
            before = layer.register_forward_pre_hook(partial(stream.bring, position))
            stack.callback(before.remove)
            after = layer.register_forward_hook(
                partial(stream.take_away, position), always_call=True
            )
            stack.callback(after.remove)
        yield


class _Stream:
    """Brings the weights of layers, each before it runs."""

    def __init__(
        self,
        skeleton: SkeletonModel,
        layers: Sequence[list[Slot]],
        reader: TensorReader,
        thread: ThreadPoolExecutor,
        host_bytes: int,
    ) -> None:
        self._skeleton, self._layers = skeleton, layers
        self._reader, self._thread = reader, thread
        self._host_bytes = host_bytes
        self._host: dict[int, list[Weight]] = {}
        self._asked: dict[int, Future[list[Weight]]] = {}

    def bring(self, position: int, *_: Any) -> None:
        """Before a layer runs: fill it, and have the next one read."""
        ahead = self._asked.pop(position, None)
        # What was read ahead of a pass that failed is of no use to this one, nor is its failure.
        self.forget()
        if ahead is None or ahead.exception() is not None:
            ahead = self._thread.submit(self._weights, position)
        for slot, weight in zip(self._layers[position], ahead.result(), strict=True):
            fill(slot, weight)
        if len(self._layers) > 1:
            # After the last one comes the first one again, with the next token or batch.
            following = (position + 1) % len(self._layers)
            self._asked[following] = self._thread.submit(self._weights, following)

    def take_away(self, position: int, *_: Any) -> None:
        """After a layer has run, or has failed to."""
        for slot in self._layers[position]:
            drain(slot)

    def forget(self) -> None:
        """Give up what is on its way."""
        for ahead in self._asked.values():
            if not ahead.cancel():
                ahead.exception()  # waits for its end
        self._asked.clear()

    def close(self) -> None:
        """End what is under way; no layer is brought any more."""
        self.forget()

    def _weights(self, position: int) -> list[Weight]:
        device = self._skeleton.device
        if position in self._host:
            return [_moved(weight, device) for weight in self._host[position]]
        slots = self._layers[position]
        weights = [self._skeleton.read(slot, self._reader) for slot in slots]
        layer_bytes = sum(slot.num_bytes for slot in slots)
        if layer_bytes <= self._host_bytes:
            self._host_bytes -= layer_bytes
            self._host[position] = [_moved(weight, "cpu") for weight in weights]
        return weights


@dataclass
class _Buffer:
    """Memory of the device that holds the layers in turn.

    Attributes:
        memory: Bytes; None until the first layer comes.
        free: An event after the last computation that read it.
    """

    memory: torch.Tensor | None = None
    free: Any = None


class _OverlappedStream:
    """Brings the weights of layers while the device runs the ones before.

    Two buffers take turns. The next layer is copied into one while the layer in the other runs;
    events keep their order: a layer runs after its copy, and a buffer is written after the layer
    that was in it has run. Where the machine's memory does not hold a layer, the thread reads it
    from the checkpoint into the buffer.
    """

    def __init__(
        self,
        skeleton: SkeletonModel,
        layers: Sequence[list[Slot]],
        reader: TensorReader,
        thread: ThreadPoolExecutor,
        host_bytes: int,
        copies: Copies,
    ) -> None:
        self._skeleton, self._layers = skeleton, layers
        self._reader, self._thread = reader, thread
        self._host_bytes = host_bytes
        self._copies = copies
        self._num_bytes = max(buffer_bytes(slots) for slots in layers)
        self._host: dict[int, tuple[torch.Tensor, Layout]] = {}
        self._pinned: list[torch.Tensor] = []
        self._buffers = [_Buffer() for _ in range(_IN_FLIGHT)]
        self._running: _Buffer | None = None
        self._ahead: tuple[int, _Buffer, Future[tuple[list[Weight], Any]]] | None = None

    def bring(self, position: int, *_: Any) -> None:
        """Before a layer runs: fill it, and have the next one copied."""
        ahead = self._ahead
        if ahead is None or ahead[0] != position or ahead[2].exception() is not None:
            # What was copied ahead of a pass that failed is of no use to this one.
            self.forget()
            ahead = self._ask(position)
        self._ahead = None
        _, self._running, future = ahead
        weights, copied = future.result()
        self._copies.wait(copied)
        for slot, weight in zip(self._layers[position], weights, strict=True):
            fill(slot, weight)
        if len(self._layers) > 1:
            # After the last one comes the first one again, with the next token or batch.
            self._ahead = self._ask((position + 1) % len(self._layers))

    def take_away(self, position: int, *_: Any) -> None:
        """After a layer has been asked to run, or has failed to."""
        for slot in self._layers[position]:
            drain(slot)
        if self._running is not None:
            self._running.free = self._copies.computed()
            self._running = None

    def forget(self) -> None:
        """Give up what is on its way."""
        if self._ahead is not None:
            self._ahead[2].exception()  # waits for its end
            self._ahead = None

    def close(self) -> None:
        """End what is under way, and give the memory back."""
        self.forget()
        self._copies.finish()
        for memory in self._pinned:
            self._copies.unpin(memory)
        self._pinned.clear()
        self._host.clear()
        self._buffers.clear()

    def _ask(self, position: int) -> tuple[int, _Buffer, Future[tuple[list[Weight], Any]]]:
        buffer = next(buffer for buffer in self._buffers if buffer is not self._running)
        return position, buffer, self._thread.submit(self._copy, position, buffer)

    # By the thread, which is in nobody's inference mode: such tensors could not be written again.
    def _copy(self, position: int, buffer: _Buffer) -> tuple[list[Weight], Any]:
        if buffer.memory is None:
            # Made on the computing stream, and held to the end: its memory is nobody else's.
            buffer.memory = torch.empty(
                self._num_bytes, dtype=torch.uint8, device=self._skeleton.device
            )
            buffer.free = self._copies.computed()
        with self._copies.stream(buffer.free):
            if position in self._host:
                host, layout = self._host[position]
                buffer.memory[: len(host)].copy_(host, non_blocking=True)
            else:
                layout = write_weights(self._read(position), buffer.memory)
                self._keep(position, buffer.memory, layout)
            return layout.views(buffer.memory), self._copies.copied()

    def _read(self, position: int) -> Iterable[Weight]:
        return (self._skeleton.read(slot, self._reader) for slot in self._layers[position])

    def _keep(self, position: int, memory: torch.Tensor, layout: Layout) -> None:
        if layout.num_bytes > self._host_bytes:
            return
        self._host_bytes -= layout.num_bytes
        host = torch.empty(layout.num_bytes, dtype=torch.uint8)
        host.copy_(memory[: layout.num_bytes])
        if self._copies.pin(host):
            self._pinned.append(host)
        self._host[position] = host, layout


def _turned_bytes(skeleton: SkeletonModel) -> int:
    """The largest weight before it is quantized, or raised to another type."""
    return max(slot.shape.numel() for slot in skeleton.slots.values()) * skeleton.dtype.itemsize


def _moved(weight: Weight, device: str) -> Weight:
    state = weight.quant_state
    if state is not None:
        # Its own way to another device changes it.
        state = copy.copy(state)
        state.state2 = copy.copy(state.state2)
        state.to(device)
    return Weight(weight.data.to(device), state)
