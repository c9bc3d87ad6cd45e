"""Random numbers of dropout and of routers, drawn in the order of a pass through the whole model.

A resident model draws its masks micro-batch by micro-batch, and in each of them layer by layer;
where all micro-batches pass a layer before the next one comes, the order is another. The state
from which each part draws is therefore found beforehand: what each part draws is known by the
shapes that its calls are given, and drawing as much once more takes the generator to where the
next part begins. Masks are then those of the resident model, to the bit, and those of a layer's
second run are those of its first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.parts import ModelParts

# Sequences and tokens of two small passes. Every size of a shape that depends on either is told by
# them: no two of 2, 3 and 6 become the same of 5, 7 and 35.
_PROBES = ((2, 3), (5, 7))
# A number for each element of what they are given: routers choose experts by some, and blur what
# they see by others.
_DRAWN = (torch.Tensor.exponential_, torch.Tensor.uniform_, torch.rand_like)


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
class _Given:
    """A tensor that a call was given: its shape and type."""

    shape: tuple[Any, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Draw:
    """A call that draws.

    Attributes:
        function: ``dropout``, attention with dropout, or one of :data:`_DRAWN`.
        args: Tensors as :class:`_Given`, of which a size may be a function of the numbers of
            sequences and tokens; all else as it was.
        kwargs: The same, by name.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def repeat(self, sequences: int, tokens: int, device: torch.device) -> None:
        """Draw as often on sequences of another number and length."""

        # The same function on the same shapes: how many numbers it draws is its own affair.
        def made(value: Any) -> Any:
            if not isinstance(value, _Given):
                return value
            sizes = [s(sequences, tokens) if callable(s) else s for s in value.shape]
            return torch.zeros(sizes, dtype=value.dtype, device=device)

        args = [made(value) for value in self.args]
        self.function(*args, **{name: made(value) for name, value in self.kwargs.items()})


class _Recorded(TorchFunctionMode):
    """Note what every call that draws is given, in order: modules make them, and layers may too."""

    def __init__(self, draws: list[_Draw]) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Torch hands dropout's own on by name, however they were passed.
        if (
            (func is dropout and kwargs["p"] and kwargs["training"])
            or (func is scaled_dot_product_attention and kwargs.get("dropout_p"))
            or func in _DRAWN
        ):
            told = {name: _given(value) for name, value in kwargs.items()}
            self._draws.append(_Draw(func, tuple(map(_given, args)), told))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Draws:
    """What the parts of a model draw: before the first layer, in each layer, and in the head."""

    entry: list[_Draw]
    layers: list[list[_Draw]]
    head: list[_Draw]

    def before_head(self) -> list[list[_Draw]]:
        """Entry and layers, in the order of a pass."""
        return [self.entry, *self.layers]


class DrawOrder:
    """What a model's entry, its decoder layers and its head draw, and from which state.

    Args:
        parts: Of the model, in training mode. It is run on a few tokens, its frozen linears
            aside, and so needs no weights in its layers.
        device: Where it computes.

    Raises:
        LoramError: It draws otherwise than by these calls.
    """

    def __init__(self, parts: ModelParts, device: torch.device) -> None:
        self._parts, self._device = parts, device
        state = generator_state(device)
        small, large = (self._recorded(*probe) for probe in _PROBES)
        set_generator_state(state, device)
        try:
            entry, *layers = map(_all_in_general, small.before_head(), large.before_head())
        except ValueError as error:
            raise _unknown_draws() from error
        self._draws = _Draws(entry, layers, small.head)

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at all."""
        return bool(self._draws.head or any(self._draws.before_head()))

    def states(
        self, shapes: Sequence[tuple[int, int]], loss_tokens: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        """The state from which each part draws; torch's generator is left where the step ends.

        The head draws right after the last layer, from where that one ends.

        Args:
            shapes: Sequences and their length, of each micro-batch.
            loss_tokens: Tokens that carry loss, of each micro-batch.

        Returns:
            By micro-batch: before the first layer, then of each layer.
        """
        found = []
        for shape, tokens in zip(shapes, loss_tokens, strict=True):
            mine: list[torch.Tensor] = []
            drew = True
            for draws in self._draws.before_head():
                # Where nothing was drawn in between, it is the same state.
                mine.append(generator_state(self._device) if drew else mine[-1])
                for draw in draws:
                    draw.repeat(*shape, self._device)
                drew = bool(draws)
            for start in range(0, tokens, self._parts.chunk):
                for draw in self._draws.head:
                    draw.repeat(1, min(self._parts.chunk, tokens - start), self._device)
            found.append(mine)
        return found

    def _recorded(self, sequences: int, tokens: int) -> _Draws:
        """What is drawn on so much, once it is known that nothing else draws.

        Raises:
            LoramError: Something else does.
        """
        device, parts = self._device, self._parts
        found = _Draws([], [[] for _ in parts.layers], [])
        begun = generator_state(device)
        with torch.no_grad(), _linears_bypassed(parts):
            ids = torch.zeros((sequences, tokens), dtype=torch.long, device=device)
            with _Recorded(found.entry):
                hidden, calls = parts.enter(ids)
            for i, layer in enumerate(parts.layers):
                with _Recorded(found.layers[i]):
                    hidden = calls.run(i, layer, hidden)
            with _Recorded(found.head):
                parts.logits_of(hidden[0])
        ended = generator_state(device)
        set_generator_state(begun, device)
        for draw in chain(*found.before_head(), found.head):
            draw.repeat(sequences, tokens, device)
        if not torch.equal(generator_state(device), ended):
            raise _unknown_draws()
        # The head is given one sequence's tokens, without an axis for sequences.
        head = [_along_tokens(draw, tokens) for draw in found.head]
        return _Draws(found.entry, found.layers, head)


def _given(value: Any) -> Any:
    return _Given(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def _all_in_general(small: list[_Draw], large: list[_Draw]) -> list[_Draw]:
    return [_in_general(one, other) for one, other in zip(small, large, strict=True)]


def _in_general(one: _Draw, other: _Draw) -> _Draw:
    """A draw for any number of sequences and tokens, from what it was given on two small passes.

    Raises:
        ValueError: They do not tell how its shapes depend on them.
    """

    def joined(a: Any, b: Any) -> Any:
        if not isinstance(a, _Given) or not isinstance(b, _Given):
            return a
        sizes = zip(a.shape, b.shape, strict=True)
        return _Given(tuple(_size(small, large) for small, large in sizes), a.dtype)

    if one.function is not other.function or one.kwargs.keys() != other.kwargs.keys():
        raise ValueError("another call")
    args = tuple(joined(a, b) for a, b in zip(one.args, other.args, strict=True))
    kwargs = {name: joined(value, other.kwargs[name]) for name, value in one.kwargs.items()}
    return _Draw(one.function, args, kwargs)


def _size(small: int, large: int) -> Any:
    """A size of a shape: a number, or how it follows from sequences and tokens."""
    if small == large:
        return small
    for how in (lambda n, t: n, lambda n, t: t, lambda n, t: n * t):
        if [how(*probe) for probe in _PROBES] == [small, large]:
            return how
    raise ValueError(f"a size of {small}, then of {large}")


def _along_tokens(draw: _Draw, tokens: int) -> _Draw:
    """A draw of the head, which is given (tokens, width)."""
    first = draw.args[0]
    if len(draw.args) != 1 or first.shape[0] != tokens:
        raise _unknown_draws()
    given = _Given((lambda _, t: t, *first.shape[1:]), first.dtype)
    return _Draw(draw.function, (given,), draw.kwargs)


def _unknown_draws() -> LoramError:
    return LoramError(
        "this model draws random numbers in training that --stream cannot repeat in its order",
        "set dropout and jitter in config.json to 0, pass --attention sdpa, or leave out --stream",
    )


def _are_experts(module: torch.nn.Module) -> bool:
    """Whether a module holds the weights of all its experts at once, shape (experts, ..., ...)."""
    own = list(module.parameters(recurse=False))
    return any(p.ndim == 3 for p in own) and not any(p.requires_grad for p in own)


def _zeros_like_input(hidden: torch.Tensor, *routing: Any) -> torch.Tensor:
    """What experts give: as many numbers as they get."""
    return torch.zeros_like(hidden)


@contextmanager
def _linears_bypassed(parts: ModelParts) -> Iterator[None]:
    """Frozen linears and fused experts give zeros, of the type that they would give."""
    bypassed: list[Any] = []
    for module in parts.inner.modules():
        if _are_experts(module):
            module.forward = _zeros_like_input
            bypassed.append(module)
        if not isinstance(module, torch.nn.Linear) or module.weight.requires_grad:
            continue
        if type(module).__module__.startswith("transformers."):
            continue  # Llama 4's router is a linear that gives more than a product

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
