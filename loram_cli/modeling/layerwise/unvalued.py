"""Products that a layer's second forward pass can leave out: those whose values nothing needs.

A layer is run again for its backward pass, from the same input, and its output is known already.
What is only added into that output (the last product of the MLP, where no norm follows it) has no
reader: its input has a gradient, its value has none. Which products those are is read from
autograd's own graph of the layer, not from its family: all that uses them leads to the output by
sums alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from loram_cli.modeling.low_bit_linear import LowBitLinear
from loram_cli.modeling.quantize import expanded_nf4

# Of autograd's nodes, those whose gradient depends on no value: sums, and the same numbers in
# another shape or type.
_SUMS = {"AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0",
         "ToCopyBackward0", "CloneBackward0"}  # fmt: skip


@contextmanager
def recorded_products(layer: Any) -> Iterator[dict[Any, Any]]:
    """Within the block, the node of autograd's graph that each frozen linear of a layer makes.

    Args:
        layer: A module.
    """
    nodes: dict[Any, Any] = {}

    def record(module: Any, _: Any, out: Any) -> None:
        # Llama 4's router is a linear that gives two tensors.
        if isinstance(out, torch.Tensor):
            nodes[module] = out.grad_fn

    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_hook(record) for m in linears if not m.weight.requires_grad]
    try:
        yield nodes
    finally:
        for handle in handles:
            handle.remove()


def without_readers(out: torch.Tensor, nodes: dict[Any, Any]) -> list[Any]:
    """The linears whose value only ever is added into a layer's output.

    Args:
        out: The output, with its graph.
        nodes: From :func:`recorded_products` around the pass that made it.
    """
    readers = _readers(out.grad_fn)
    left = {node: len(those) for node, those in readers.items()}
    only_added: set[Any] = set()
    waiting: list[Any] = [out.grad_fn]
    while waiting:
        # All that reads this node has been looked at.
        node = waiting.pop()
        if all(reader in only_added and reader.name() in _SUMS for reader in readers[node]):
            only_added.add(node)
        for before, _ in node.next_functions:
            if before is not None:
                left[before] -= 1
                waiting += [before] if left[before] == 0 else []
    return [linear for linear, node in nodes.items() if node in only_added]


def _readers(root: Any) -> dict[Any, list[Any]]:
    """Every node below one, and the nodes that take its value, as often as they do."""
    readers: dict[Any, list[Any]] = {root: []}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        for before, _ in node.next_functions:
            if before is None:
                continue
            if before not in readers:
                readers[before] = []
                waiting.append(before)
            readers[before].append(node)
    return readers


@contextmanager
def left_out(linears: Sequence[Any]) -> Iterator[None]:
    """Within the block, these linears give zeros, and the gradient that they always give.

    Args:
        linears: Frozen ones, of plain weights, in NF4 or of few bits.
    """
    for linear in linears:
        linear.forward = partial(_without_value, linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _without_value(linear: Any, inputs: torch.Tensor) -> torch.Tensor:
    kind, given = inputs.device.type, inputs.dtype
    state = getattr(linear.weight, "quant_state", None) or getattr(linear, "quant_state", None)
    if state is not None:
        inputs = inputs.to(linear.compute_dtype or given)

        def expanded() -> torch.Tensor:
            return expanded_nf4(linear.weight, state)

        out = _Unvalued.apply(inputs, expanded, linear.out_features)
        return out.to(given)
    if isinstance(linear, LowBitLinear):
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        inputs = inputs.to(dtype or linear.compute_dtype)
        kept = inputs.dtype
        return _Unvalued.apply(inputs, lambda: linear.floating(kept), linear.out_features)
    weight = linear.weight
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        inputs, weight = inputs.to(dtype), weight.to(dtype)
    out = _Unvalued.apply(inputs, lambda: weight, linear.out_features)
    return out


class _Unvalued(torch.autograd.Function):
    """Zeros in place of a product, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: Callable[[], torch.Tensor], width: int
    ) -> torch.Tensor:
        ctx.weight = weight
        return inputs.new_zeros(()).expand(*inputs.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        weight = ctx.weight().to(gradient.dtype)
        # As torch does: rows of all sequences in one product.
        rows = gradient.reshape(-1, gradient.shape[-1]).mm(weight)
        return rows.view(*gradient.shape[:-1], -1), None, None
