"""Exact LoRA on a full model of which two decoder layers at a time have weights.

All micro-batches of an optimizer step pass a layer before the next one is brought, forward and then
backward, so that reading a layer is paid once a direction and not once a micro-batch. Hidden
states at layer boundaries are kept, and each layer is run again for its backward pass, but for
products that this does not need (see :mod:`.unvalued`). What is added to each factor's gradient,
and in which order, is what a resident model adds under gradient accumulation; with dropout from the
same random numbers (see :mod:`.draws`). Losses and gradients are therefore the resident model's,
to the bit.

Sources: Chen et al., sublinear memory (arXiv 1604.06174); Pudipeddi et al., L2L: layers as the
outer loop, micro-batches as the inner one (arXiv 2002.05645).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any

import torch

from loram_cli.modeling.copies import Copies, usual_copies
from loram_cli.modeling.layer_feed import LayerFeed, LayerSource, fed_layers
from loram_cli.modeling.layerwise.draws import DrawOrder, generator_state, set_generator_state
from loram_cli.modeling.layerwise.kept_states import KeptStates, Place
from loram_cli.modeling.layerwise.parts import LayerCalls, ModelParts
from loram_cli.modeling.layerwise.unvalued import left_out, recorded_products, without_readers
from loram_cli.modeling.skeleton import SkeletonModel, drain, fill
from loram_cli.reporting import Reporter

_IGNORED_LABEL = -100

Batch = Mapping[str, torch.Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]


@contextmanager
def streamed_lora(
    skeleton: SkeletonModel,
    model: Any,
    reporter: Reporter,
    *,
    stay: int = 0,
    host_bytes: int = 0,
    activations: Place = "device",
    copies: Copies | None = None,
) -> Iterator["LoraPass"]:
    """Fill what stays, and open the way for the layers that come and go, within the block.

    Args:
        skeleton: Not filled yet.
        model: The PEFT model around :attr:`SkeletonModel.model`.
        reporter: Progress and warnings.
        stay: How many layers stay, from the first one on.
        host_bytes: Memory of the machine for copies of the other layers, see
            :class:`.WeightSource`.
        activations: Where hidden states at layer boundaries are kept, see :class:`.KeptStates`.
        copies: How layers get to the device while it computes; None takes a GPU's own, and on a
            CPU has them read where they are needed.

    Raises:
        LoramError: A tensor is absent or of another shape, or the config asks for dropout inside
            attention.
    """
    slots = [slots for _, slots in skeleton.layers()]
    if copies is None:
        copies = usual_copies(skeleton.device)
    with (
        fed_layers(skeleton, slots, stay, reporter, host_bytes=host_bytes, copies=copies) as (
            source,
            feed,
        ),
        closing(KeptStates(activations, torch.device(skeleton.device))) as kept,
    ):
        yield LoraPass(skeleton, model, source, feed, kept, stay)


class LoraPass:
    """Losses and gradients of a PEFT model, layer by layer. Made by :func:`streamed_lora`.

    Attributes:
        model: The PEFT model.
        parts: Its parts.
        slots: What each layer is filled with.
        source: Where weights come from; counts them.
        feed: Brings them.
    """

    def __init__(
        self,
        skeleton: SkeletonModel,
        model: Any,
        source: LayerSource,
        feed: LayerFeed,
        kept: KeptStates,
        stay: int,
    ) -> None:
        self.model, self.source = model, source
        self.feed, self._kept, self._stay = feed, kept, stay
        self._device = torch.device(skeleton.device)
        self.slots = [slots for _, slots in skeleton.layers()]
        self.parts = ModelParts(model)
        self._draws: DrawOrder | None = None
        # By layer, the products that its second run can do without.
        self._unread: dict[int, list[Any]] = {}
        layers = self.parts.layers
        trained = (
            i for i, at in enumerate(layers) if any(p.requires_grad for p in at.parameters())
        )
        # Below the first factor no gradient is needed.
        self._first = next(trained, len(layers) - 1)

    def accumulate(
        self,
        batches: Sequence[Batch],
        num_items: torch.Tensor | int | None,
        *,
        autocast: Autocast = nullcontext,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    ) -> list[torch.Tensor]:
        """Add the gradients of an optimizer step to the factors, as the resident model does.

        Args:
            batches: Micro-batches: ``input_ids`` and ``labels``, shape (batch, length), on the
                device; padding stands on the right, without a mask. ``position_ids`` where a row
                holds several examples.
            num_items: Tokens that carry loss in all of them together, or None for means of each.
            autocast: Makes the context of mixed precision.
            backward: Starts the backward pass from a micro-batch's loss.

        Returns:
            The losses, one scalar for each micro-batch.
        """
        self.model.train()
        draws = self._draw_order(autocast)
        states = None
        if draws.draws:
            states = draws.states(
                [(len(ids), ids.shape[1]) for ids in (batch["input_ids"] for batch in batches)],
                loss_tokens(batches),
            )
        layers = self.parts.layers
        last = len(layers) - 1
        # To the last layer and back, which is where the next step begins.
        walk = [*range(last + 1), *range(last - 1, self._first - 1, -1)]
        step = _Step(batches, states, self._kept)
        final = generator_state(self._device)
        step.enter(self.parts, self._device)
        for i in range(last):
            with self._layer(i, walk) as layer, torch.no_grad():
                for m in range(len(batches)):
                    step.draw_from(m, i, self._device)
                    with autocast():
                        out = step.calls[m].run(i, layer, step.take(i, m, keep=i >= self._first))
                    step.put(i + 1, m, out)
                del out
        losses = []
        with self._layer(last, walk) as layer:
            for m, batch in enumerate(batches):
                hidden = step.take(last, m).requires_grad_(last > self._first)
                step.draw_from(m, last, self._device)
                with autocast():
                    out = step.calls[m].run(last, layer, hidden)
                    loss = self.parts.loss(out, batch["labels"], num_items)
                if loss.requires_grad:
                    backward(loss)
                losses.append(loss.detach())
                if hidden.grad is not None:
                    step.put(last, m, hidden.grad)
                del hidden, out, loss
        for i in range(last - 1, self._first - 1, -1):
            with self._layer(i, walk, back=True) as layer:
                for m in range(len(batches)):
                    gradient = step.take(i + 1, m)
                    hidden = step.take(i, m).requires_grad_(i > self._first)
                    step.draw_from(m, i, self._device)
                    out = self._run_again(i, layer, step.calls[m], hidden, autocast)
                    torch.autograd.backward(out, gradient)
                    if hidden.grad is not None:
                        step.put(i, m, hidden.grad)
                    del hidden, gradient, out
        set_generator_state(final, self._device)
        return losses

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch], *, autocast: Autocast = nullcontext) -> list[float]:
        """Mean loss per token of each batch, without dropout.

        Args:
            batches: As for :meth:`accumulate`.
            autocast: Makes the context of mixed precision.
        """
        was_training = self.model.training
        self.model.eval()
        layers = self.parts.layers
        step = _Step(batches, None, self._kept)
        step.enter(self.parts, self._device)
        walk = range(len(layers))
        for i in walk:
            with self._layer(i, walk) as layer:
                for m in range(len(batches)):
                    with autocast():
                        out = step.calls[m].run(i, layer, step.take(i, m))
                    step.put(i + 1, m, out)
                del out
        found = []
        for m, batch in enumerate(batches):
            with autocast():
                hidden = step.take(len(layers), m)
                found.append(float(self.parts.loss(hidden, batch["labels"], None)))
        self.model.train(was_training)
        return found

    @property
    def boundaries(self) -> int:
        """How many layer boundaries a training step keeps; an evaluation keeps one."""
        return len(self.parts.layers) - self._first

    def _run_again(
        self, index: int, layer: Any, calls: LayerCalls, hidden: torch.Tensor, autocast: Autocast
    ) -> torch.Tensor:
        """A layer's output with its graph, of which only the graph is right."""
        unread = self._unread.get(index)
        if unread is not None:
            with left_out(unread), autocast():
                return calls.run(index, layer, hidden)
        with recorded_products(layer) as nodes, autocast():
            out = calls.run(index, layer, hidden)
        self._unread[index] = without_readers(out, nodes)
        return out

    def _draw_order(self, autocast: Autocast) -> DrawOrder:
        if self._draws is None:
            with autocast():
                self._draws = DrawOrder(self.parts, self._device)
        return self._draws

    @contextmanager
    def _layer(self, index: int, walk: Sequence[int], *, back: bool = False) -> Iterator[Any]:
        """A layer with its weights for the length of the block, the next one loaded meanwhile."""
        layer, slots = self.parts.layers[index], self.slots[index]
        if index < self._stay:
            yield layer
            return
        at = len(walk) - 1 - index if back else index
        following = (walk[(at + n) % len(walk)] for n in range(1, len(walk)))
        then = next((i for i in following if i >= self._stay and i != index), None)
        for slot, weight in zip(slots, self.feed.take(index, then), strict=True):
            fill(slot, weight)
        try:
            yield layer
        finally:
            for slot in slots:
                drain(slot)


class _Step:
    """What belongs to the micro-batches that pass the layers together."""

    def __init__(
        self, batches: Sequence[Batch], states: list[list[torch.Tensor]] | None, kept: KeptStates
    ) -> None:
        self._batches, self._states, self._kept = batches, states, kept
        self.put, self.take = kept.put, kept.take
        self.calls: list[LayerCalls] = []

    def enter(self, parts: ModelParts, device: torch.device) -> None:
        """Embed every micro-batch."""
        # What a step that failed has left.
        self._kept.clear()
        known: dict[tuple[int, ...], LayerCalls] = {}
        for m, batch in enumerate(self._batches):
            if self._states is not None:
                set_generator_state(self._states[m][0], device)
            positions = batch.get("position_ids")
            hidden, calls = parts.enter(batch["input_ids"], positions)
            # Masks and rotary embeddings depend on the shape alone, unless rows are shared.
            if positions is None:
                calls = known.setdefault(tuple(hidden.shape), calls)
            self.calls.append(calls)
            self.put(0, m, hidden)

    def draw_from(self, micro_batch: int, layer: int, device: torch.device) -> None:
        """Let the next random numbers be those that the resident model draws there."""
        if self._states is not None:
            set_generator_state(self._states[micro_batch][layer + 1], device)


def loss_tokens(batches: Sequence[Batch]) -> list[int]:
    """How many tokens of each micro-batch carry loss."""
    return [int((batch["labels"][:, 1:] != _IGNORED_LABEL).sum()) for batch in batches]
