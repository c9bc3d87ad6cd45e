"""Weights rounded to few bits, by themselves or with error feedback (GPTQ, YAQA).

What a code stands for is a file of its own: :mod:`.grid` and :mod:`.trellis`.
"""

from collections.abc import Mapping
from dataclasses import fields

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import Codes
from loram_cli.pruning.columns import Columns, RowFeed
from loram_cli.pruning.grid import GridColumns
from loram_cli.pruning.sparsegpt import Hessian, factor_in_order, falling
from loram_cli.pruning.trellis import TrellisColumns

_COLUMNS: Mapping[str, type[Columns]] = {"grid": GridColumns, "trellis": TrellisColumns}

# Of the outputs' Hessian, as a share of its mean diagonal. It has few large directions, which are
# to count, and many small ones that some thousand tokens tell nothing of.
_OUTPUT_DAMPENING = 0.1
# Rows that are rounded together: each block takes a sweep over all columns.
_LEAST_BLOCK_ROWS = 32
_MOST_ROW_BLOCKS = 32


def round_nearest(weight: torch.Tensor, low_bit: LowBit) -> Codes:
    """Round each weight by itself; needs no text."""
    return _COLUMNS[low_bit.codes].nearest(weight.float(), low_bit)


def round_with_feedback(
    weight: torch.Tensor,
    hessian: Hessian,
    low_bit: LowBit,
    dampening: float,
    where: str,
    block_columns: int = 128,
) -> Codes:
    """Round column by column; each one's error is made up for by the columns that follow (GPTQ).

    Source: Frantar et al., "GPTQ" (arXiv 2210.17323), Algorithm 1. Columns go by falling diagonal
    of the Hessian ("act-order" in its reference code), with steps and zeros chosen beforehand, so
    that groups stay neighbours in memory.

    Args:
        weight: Shape (rows, columns).
        hessian: Of the module's inputs; left as it is.
        low_bit: Bits and groups.
        dampening: Added to the Hessian's diagonal, as a share of its mean.
        where: What to name in an error.
        block_columns: Columns whose updates are held back until the block is done.

    Raises:
        LoramError: The Hessian is not finite or has no inverse.
    """
    columns = _COLUMNS[low_bit.codes].of(hessian, low_bit, dampening, where, block_columns)
    return columns.round(weight.float())


def round_on_both_sides(
    weight: torch.Tensor,
    hessian: Hessian,
    gradients: torch.Tensor,
    low_bit: LowBit,
    dampening: float,
    where: str,
    block_columns: int = 128,
) -> Codes:
    """Round so that errors cancel in what goes in and in what comes back (YAQA).

    The loss changes by ``tr(G E H E^T)`` for an error ``E``, where ``H`` is the Hessian of the
    inputs and ``G`` that of the outputs: the sum of ``g g^T`` over the loss's gradients by them.
    Columns feed their errors to the columns that follow, as in GPTQ, and rows to the rows that
    follow, by ``G``. GPTQ takes ``G`` to be the identity; the small model's gradients, which LoRA
    learns from, are then further from the base's.

    Source: Tseng et al., "Model-Preserving Adaptive Rounding" (arXiv 2505.22988). Rows and columns
    feed back one by one there; here rows do in blocks, at most 32 of them to a weight, and GPTQ
    rounds each block. The inputs' Hessian there is weighted by the gradients; here it is GPTQ's.

    Args:
        weight: Shape (rows, columns).
        hessian: Of the module's inputs; left as it is.
        gradients: Of the loss by the module's outputs, shape (tokens, rows), or what stands for
            them: only the sum of ``g g^T`` counts.
        low_bit: Bits and groups.
        dampening: Added to the inputs' Hessian's diagonal, as a share of its mean.
        where: What to name in an error.
        block_columns: Columns whose updates are held back until the block is done.

    Raises:
        LoramError: A Hessian is not finite or has no inverse.
    """
    columns = _COLUMNS[low_bit.codes].of(hessian, low_bit, dampening, where, block_columns)
    outputs = Hessian(len(weight), weight.device)
    largest = gradients.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    outputs.add(gradients.to(weight.device, torch.float32) / largest)
    order = falling(outputs.total.diagonal())
    upper = factor_in_order(outputs, order, _OUTPUT_DAMPENING, f"{where}: its outputs")
    size = max(_LEAST_BLOCK_ROWS, -(-len(weight) // _MOST_ROW_BLOCKS))
    codes = columns.round_rows(weight.float()[order], RowFeed(upper, size))
    back = torch.argsort(order)
    return Codes(*(getattr(codes, field.name)[back] for field in fields(Codes)))
