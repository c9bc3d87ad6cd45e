"""Weights that stay in the type of their file, and are raised where they are used."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

# How experts' weights enter a product; all else sees them as they are.
_USES = frozenset(
    (
        torch.Tensor.__getitem__,
        torch.Tensor.__matmul__,
        torch.Tensor.__rmatmul__,
        torch.Tensor.matmul,
        torch.Tensor.bmm,
        torch.matmul,
        torch.bmm,
        linear,
    )
)


class RaisedWeight(torch.nn.Parameter):
    """The weights of all experts, of which those taken by index are raised to another type.

    A layer of experts is the largest thing that a streamed model holds, and twice that in fp32; a
    forward that takes one expert at a time holds one expert's weight in fp32 beside it.

    Args:
        data: As stored, shape (experts, ..., ...).
        dtype: What a product gets.
    """

    raised_to: torch.dtype

    def __new__(cls, data: torch.Tensor, dtype: torch.dtype) -> "RaisedWeight":
        """Frozen; it takes no copy."""
        weight = super().__new__(cls, data, requires_grad=False)
        weight.raised_to = dtype
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Torch's own call, given what it shall see of a weight."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.__getitem__:
                weight, index = args
                return weight[index].to(weight.raised_to)
            if func in _USES:
                args = tuple(_raised(value) for value in args)
                kwargs = {name: _raised(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)


def _raised(value: Any) -> Any:
    return value.to(value.raised_to) if isinstance(value, RaisedWeight) else value
