"""A linear module whose frozen weight stays in few bits: it is a floating one only while it works.

Own code, and not HQQ's or GPTQ's module: PEFT trains on both, but HQQ's packs 3 bits as 3.2, keeps
a step and a zero of 16 bits for each group (3.7 bits for groups of 64) and depends on a package;
GPTQ's kernels need a GPU. PEFT treats this module as any other linear, on a CPU and on a GPU.
"""

from typing import Any

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import weight_of


class LowBitLinear(torch.nn.Linear):
    """``torch.nn.Linear`` over rows of bytes, frozen; gradients reach only the input.

    Args:
        plain: The linear that it takes the place of; its bias is taken over.
        low_bit: How the weight is rounded.
        compute_dtype: The weight's type in a product, where no autocast asks for another.

    Attributes:
        weight: Rows of bytes, uint8, shape (rows, row_bytes).
        low_bit: As given.
        compute_dtype: As given; PEFT reads it as well, for the type of its factors.
    """

    def __init__(self, plain: torch.nn.Linear, low_bit: LowBit, compute_dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.low_bit, self.compute_dtype = low_bit, compute_dtype
        rows = torch.empty(
            (plain.out_features, low_bit.row_bytes(plain.in_features)),
            dtype=torch.uint8,
            device="meta",
        )
        self.weight = torch.nn.Parameter(rows, requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product in the autocast's type, or in the module's own."""
        kind = input.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        out: torch.Tensor = _Product.apply(
            input.to(dtype), self.weight, bias, self.low_bit, self.in_features
        )
        return out

    def floating(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as floating numbers, shape (rows, columns)."""
        return weight_of(self.weight, self.low_bit, self.in_features, dtype)


class _Product(torch.autograd.Function):
    """Keeps the bytes for the way back; autograd would keep every layer's floating weight."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        low_bit: LowBit,
        columns: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.low_bit, ctx.columns, ctx.dtype = low_bit, columns, input.dtype
        weight = weight_of(packed, low_bit, columns, input.dtype)
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (packed,) = ctx.saved_tensors
        weight = weight_of(packed, ctx.low_bit, ctx.columns, ctx.dtype)
        return grads[0].to(ctx.dtype) @ weight, None, None, None, None
