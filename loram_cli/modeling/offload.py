"""A causal LM that exceeds the memory: some decoder layers have weights only while they run.

The first layers stay, as many as fit. Each of the others is brought when its turn comes, the next
one read meanwhile by a thread, and its weights go when it has run: every forward pass reads them
anew, from the machine's memory where they fit in there, else from the checkpoint. On a GPU they
come from pinned memory on a stream of their own, so that the next layer is copied while this one
runs. Where few tokens pass, as when a text is continued, a layer comes without its routed experts,
and those that its router picks are read once it has picked them. What is computed is the same to
the bit.

accelerate can offload as well, but PEFT (0.21) loads an adapter onto such a model by writing the
checkpoint anew with the factors in it: over the original where its path is relative, else below the
working directory. Hence this way.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

from loram_cli.arch.experts import reached_share
from loram_cli.errors import LoramError
from loram_cli.memory.streaming import HELD_LAYERS
from loram_cli.modeling.copies import Copies, usual_copies
from loram_cli.modeling.layer_feed import LayerSource, fed_layers
from loram_cli.modeling.skeleton import SkeletonModel, drain, fill
from loram_cli.reporting import Reporter
from loram_cli.units import format_bytes

# Of a layer's experts, as :func:`.reached_share` counts them: above it the whole layer is read, and
# the next one meanwhile.
_MOST_SHARE = 0.9


def weight_bytes(skeleton: SkeletonModel) -> int:
    """What all weights of a model take, and one more that is being turned into its form."""
    return sum(slot.num_bytes for slot in skeleton.slots.values()) + _turned_bytes(skeleton)


def resident_layers(skeleton: SkeletonModel, budget_bytes: int) -> int:
    """How many decoder layers, from the first one on, can stay.

    Args:
        skeleton: Not filled yet.
        budget_bytes: Memory for weights on the device.

    Raises:
        LoramError: The embedding, the head and two decoder layers exceed the budget.
    """
    layers = [sum(slot.num_bytes for slot in slots) for _, slots in skeleton.layers()]
    if weight_bytes(skeleton) <= budget_bytes:
        return len(layers)
    # What is left of the weights beside the layers, and what is turned into its form.
    other = weight_bytes(skeleton) - sum(layers)
    for count in range(len(layers) - 1, -1, -1):
        passing = sorted(layers[count:])[-HELD_LAYERS:]
        least = other + sum(layers[:count]) + sum(passing)
        if least <= budget_bytes:
            return count
    raise LoramError(
        f"{skeleton.index.directory}: embedding, head and two decoder layers take "
        f"{format_bytes(least)}, and there are {format_bytes(budget_bytes)} for weights"
    )


def reaches_most(skeleton: SkeletonModel, tokens: int) -> bool:
    """Whether so many tokens reach so many of a layer's experts that it is read whole.

    Args:
        skeleton: The model; where it has no experts that come by themselves, it is so.
        tokens: How many pass a layer together.
    """
    # As many in all layers, but where they lost different numbers of them.
    experts = max((slot.experts for slot in skeleton.slots.values()), default=0)
    return not experts or reached_share(experts, skeleton.top_k, tokens) > _MOST_SHARE


@contextmanager
def loaded_within(
    skeleton: SkeletonModel,
    stay: int,
    reporter: Reporter,
    *,
    host_bytes: int = 0,
    copies: Copies | Literal["auto"] | None = "auto",
) -> Iterator[LayerSource]:
    """Fill a model, all but the last layers; those are brought as they run, within the block.

    After it the model cannot be run any more, and nothing here keeps it.

    Args:
        skeleton: Its model, with any adapters attached.
        stay: Layers that stay, from :func:`resident_layers`.
        reporter: Progress and warnings.
        host_bytes: Memory of the machine for weights of the others; 0 reads them from the
            checkpoint each time, as where they are run by the processor.
        copies: How layers get to the device while it computes; None copies from pageable memory
            on the stream that computes, and ``auto`` does so on anything but a GPU.

    Yields:
        What brings the layers; it counts their bytes.

    Raises:
        LoramError: A tensor is absent or of another shape.
    """
    layers = list(skeleton.layers())
    passing = [slots for _, slots in layers[stay:]]
    if copies == "auto":
        copies = usual_copies(skeleton.device)
    with (
        fed_layers(skeleton, passing, 0, reporter, host_bytes=host_bytes, copies=copies) as (
            source,
            feed,
        ),
        ExitStack() as stack,
    ):

        def bring(position: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # After the last one comes the first one again, with the next token or batch.
            then = (position + 1) % len(passing) if len(passing) > 1 else None
            hidden = args[0] if args else kwargs["hidden_states"]
            whole = reaches_most(skeleton, hidden.shape[:-1].numel())
            weights = feed.take(position, then, whole=whole)
            for slot, weight in zip(passing[position], weights, strict=True):
                fill(slot, weight)

        def bring_reached(
            position: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            _, reached, _ = (*args, *kwargs.values())
            feed.bring_experts(position, reached.unique().tolist())

        def take_away(position: int, *_: Any) -> None:
            for slot in passing[position]:
                drain(slot)

        for position, (layer, slots) in enumerate(layers[stay:]):
            before = layer.register_forward_pre_hook(partial(bring, position), with_kwargs=True)
            stack.callback(before.remove)
            if skeleton.experts is not None and any(slot.experts for slot in slots):
                inside = layer.get_submodule(skeleton.experts.module).register_forward_pre_hook(
                    partial(bring_reached, position), with_kwargs=True
                )
                stack.callback(inside.remove)
            # After a layer that failed as well.
            after = layer.register_forward_hook(partial(take_away, position), always_call=True)
            stack.callback(after.remove)
        yield source


def _turned_bytes(skeleton: SkeletonModel) -> int:
    """The largest weight before it is quantized, or raised to another type."""
    return max(slot.shape.numel() for slot in skeleton.slots.values()) * skeleton.dtype.itemsize
