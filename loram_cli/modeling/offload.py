"""A causal LM that exceeds the memory: some decoder layers have weights only while they run.

The first layers stay, as many as fit. Each of the others is brought when its turn comes, the next
one read meanwhile by a thread, and its weights go when it has run: every forward pass reads them
anew, from the machine's memory where they fit in there, else from the checkpoint. What is computed
is the same to the bit. accelerate can offload as well, but PEFT (0.21) loads an adapter onto such a
model by writing the checkpoint anew with the factors in it: over the original where its path is
relative, else below the working directory. Hence this way.
"""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError
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
    skeleton: SkeletonModel, stay: int, reporter: Reporter, *, host_bytes: int = 0
) -> Iterator[None]:
    """Fill a model, all but the last layers; those are brought as they run, within the block.

    After it the model cannot be run any more, and nothing here keeps it.

    Args:
        skeleton: Its model, with any adapters attached.
        stay: Layers that stay, from :func:`resident_layers`.
        reporter: Told of progress.
        host_bytes: Memory of the machine for weights of the others; 0 reads them from the
            checkpoint each time, as where they are run by the processor.

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
        stream = _Stream(skeleton, passing, reader, thread, host_bytes)
        # What is under way ends before the thread does, and that before files are closed.
        stack.callback(stream.forget)
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
