"""Random numbers of dropout, drawn in the order of a pass through the whole model.

A resident model draws its masks micro-batch by micro-batch, and in each of them layer by layer;
where all micro-batches pass a layer before the next one comes, the order is another. The state
from which each layer draws is therefore found beforehand: what each part draws is known by the
shapes of its dropouts' inputs, and drawing as much once more, without computing anything with it,
takes the generator to where the next part begins. Masks are then those of the resident model,
to the bit, and those of a layer's second run are those of its first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode

from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.parts import ModelParts

# Enough tokens for a module's input to have all of its axes.
_PROBE_TOKENS = 2


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of torch's generator of a device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    """Put torch's generator of a device where it was when ``state`` was taken."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class _Draw:
    """A dropout: the width of its input, its type, and the share of zeros."""

    width: int
    dtype: torch.dtype
    share: float

    def repeat(self, tokens: Sequence[int], device: torch.device) -> None:
        # The same function on the same shape: how many numbers it draws is its own affair.
        dropout(torch.empty((*tokens, self.width), dtype=self.dtype, device=device), self.share)


class _Recorded(TorchFunctionMode):
    """Note what every dropout is given, in order: modules call the function, and layers may too."""

    def __init__(self, draws: list[_Draw]) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is dropout:
            # Torch hands these on by name, however they were passed.
            given, share = args[0], kwargs["p"]
            if share and kwargs["training"]:
                self._draws.append(_Draw(given.shape[-1], given.dtype, share))
        return func(*args, **kwargs)


class DrawOrder:
    """What each decoder layer and the head draw, and from which state.

    Args:
        parts: Of the model, in training mode. It is run once on two tokens, its frozen linears
            aside, and so needs no weights in its layers.
        device: Where it computes.

    Raises:
        LoramError: The config asks for dropout inside attention, whose draws are not known.
    """

    def __init__(self, parts: ModelParts, device: torch.device) -> None:
        if getattr(parts.inner.config, "attention_dropout", 0.0):
            raise LoramError(
                "config.json: attention_dropout is not 0, which training layer by layer "
                "does not support",
                "set attention_dropout to 0 in config.json, or train without --stream",
            )
        self._parts, self._device = parts, device
        self._layers: list[list[_Draw]] = [[] for _ in parts.layers]
        self._head: list[_Draw] = []
        state = generator_state(device)
        with torch.no_grad(), _linears_bypassed(parts):
            ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device=device)
            with _Recorded(self._head):
                hidden, calls = parts.enter(ids)
            for i, layer in enumerate(parts.layers):
                with _Recorded(self._layers[i]):
                    hidden = calls.run(i, layer, hidden)
            with _Recorded(self._head):
                parts.logits_of(hidden[0])
        set_generator_state(state, device)

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at all."""
        return bool(self._head or any(self._layers))

    def states(
        self, shapes: Sequence[tuple[int, int]], loss_tokens: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        """The state from which each layer draws; torch's generator is left where the step ends.

        The head draws right after the last layer, from where that one ends.

        Args:
            shapes: Sequences and their length, of each micro-batch.
            loss_tokens: Tokens that carry loss, of each micro-batch.

        Returns:
            By micro-batch, then by layer.
        """
        found = []
        for shape, tokens in zip(shapes, loss_tokens, strict=True):
            mine = []
            for draws in self._layers:
                mine.append(generator_state(self._device))
                for draw in draws:
                    draw.repeat(shape, self._device)
            for start in range(0, tokens, self._parts.chunk):
                for draw in self._head:
                    draw.repeat((min(self._parts.chunk, tokens - start),), self._device)
            found.append(mine)
        return found


@contextmanager
def _linears_bypassed(parts: ModelParts) -> Iterator[None]:
    """Frozen linears give zeros, of the type that they would give."""
    bypassed = []
    for module in parts.inner.modules():
        if not isinstance(module, torch.nn.Linear) or module.weight.requires_grad:
            continue

        def zeros(inputs: torch.Tensor, module: Any = module) -> torch.Tensor:
            kind = inputs.device.type
            dtype = inputs.dtype
            # A 4-bit linear gives its input's type back.
            if torch.is_autocast_enabled(kind) and type(module) is torch.nn.Linear:
                dtype = torch.get_autocast_dtype(kind)
            return inputs.new_zeros((*inputs.shape[:-1], module.out_features), dtype=dtype)

        linear: Any = module
        linear.forward = zeros
        bypassed.append(linear)
    try:
        yield
    finally:
        for module in bypassed:
            del module.forward
