"""All weights of a decoder layer in one piece of memory, so that one copy brings them.

A buffer is plain bytes; the weights are views of it, each at an offset that suits a GPU's reads.
Under NF4 a weight is several tensors: packed numbers, block maxima, their maxima, tables.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loram_cli.modeling.skeleton import Slot, Weight

# cudaMalloc's own alignment; kernels that read 16 bytes at a time want at least that.
_ALIGNMENT = 256
# Tensors of a weight at most, see :func:`_parts`.
_MOST_PARTS = 6


@dataclass(frozen=True)
class Layout:
    """Where the tensors of some weights lie in a buffer.

    Attributes:
        weights: The weights without storage: types and shapes of their tensors, on ``meta``.
        offsets: In bytes, of every tensor, weight by weight.
        num_bytes: Of the buffer that holds them all.
    """

    weights: tuple[Weight, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def views(self, buffer: torch.Tensor) -> list[Weight]:
        """The weights that lie in a buffer, without a copy."""
        found, place = [], 0
        for weight in self.weights:
            shapes = _parts(weight)
            offsets = self.offsets[place : place + len(shapes)]
            place += len(shapes)
            tensors = [_view(buffer, *pair) for pair in zip(offsets, shapes, strict=True)]
            found.append(_with_parts(weight, tensors))
        return found

    def start_of(self, weight: int) -> int:
        """Where a weight's first tensor lies, or the end of them all."""
        before = sum(len(_parts(each)) for each in self.weights[:weight])
        return self.offsets[before] if before < len(self.offsets) else self.num_bytes


def buffer_bytes(slots: Iterable[Slot]) -> int:
    """Bytes of a buffer that holds the weights of these slots."""
    return sum(slot.num_bytes + _MOST_PARTS * _ALIGNMENT for slot in slots)


def write_weights(weights: Iterable[Weight], buffer: torch.Tensor) -> Layout:
    """Copy weights into a buffer, one by one, so that each may go before the next one is made.

    Of those on ``meta`` nothing is copied, and they get their place.
    """
    shapes, offsets, end = [], [], 0
    for weight in weights:
        parts = _parts(weight)
        for tensor in parts:
            if not tensor.is_meta:
                _view(buffer, end, tensor).copy_(tensor)
            offsets.append(end)
            end = _aligned(end + tensor.nbytes)
        shapes.append(_with_parts(weight, [tensor.to("meta") for tensor in parts]))
        del weight, parts
    return Layout(tuple(shapes), tuple(offsets), end)


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _parts(weight: Weight) -> list[torch.Tensor]:
    state = weight.quant_state
    if state is None:
        return [weight.data]
    nested = state.state2
    return [weight.data, state.absmax, state.code, state.offset, nested.absmax, nested.code]


def _with_parts(weight: Weight, tensors: Sequence[torch.Tensor]) -> Weight:
    state: Any = weight.quant_state
    if state is None:
        return Weight(tensors[0])
    state = copy.copy(state)
    state.state2 = copy.copy(state.state2)
    data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code = tensors
    return Weight(data, state)
