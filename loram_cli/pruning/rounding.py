"""Weights rounded to few bits: a step and a zero for each group, and error feedback (GPTQ, YAQA).

The steps and zeros that a group can have are few (:mod:`loram_cli.checkpoint.low_bit_codes`), so
that the best are found by trying them, on the rounded weight itself, and not by its extremes: that
is what HQQ's solver (Badri and Shaji, "Half-Quadratic Quantization", 2023) does in its way.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import (
    STEPS,
    ZEROS,
    Codes,
    dequantize,
    group_steps,
    step_of,
    zero_of,
)
from loram_cli.pruning.sparsegpt import Hessian, inverse_factor

# Of the widest group's range: a little less costs its outermost weights, and serves all others.
_RANGE_SHARE = 0.95
# Zeros that are tried: the one that the group's extremes ask for, and those beside it.
_ZERO_TRIES = (-2, -1, 0, 1, 2)
# Steps that are tried, by bits: the fewer codes there are, the more of its range a group gives up.
_STEP_TRIES = {2: range(2, 8), 3: range(4), 4: range(-1, 3)}
_LEAST_SCALE = 6e-8
# Of the outputs' Hessian, as a share of its mean diagonal. It has few large directions, which are
# to count, and many small ones that some thousand tokens tell nothing of.
_OUTPUT_DAMPENING = 0.1
# Rows that are rounded together: each block takes a sweep over all columns.
_LEAST_BLOCK_ROWS = 32
_MOST_ROW_BLOCKS = 32


@dataclass(frozen=True)
class Grid:
    """Steps and zeros of a weight's groups, chosen.

    Attributes:
        step: Index of each group's step, uint8, shape (rows, groups).
        zero: Index of each group's zero, uint8, shape (rows, groups).
        scale: Of each row, fp16, shape (rows,).
    """

    step: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor

    def steps(self) -> torch.Tensor:
        """Each group's step, fp32."""
        return group_steps(self.step, self.scale)

    def zeros(self, low_bit: LowBit) -> torch.Tensor:
        """Each group's zero in codes, fp32."""
        return zero_of(self.zero, low_bit)


def choose_grid(weight: torch.Tensor, low_bit: LowBit, columns_weight: torch.Tensor) -> Grid:
    """The step and the zero of each group with the least weighted squared error.

    Args:
        weight: Shape (rows, columns).
        low_bit: Bits and groups.
        columns_weight: What an error in each column costs, shape (columns,): the diagonal of the
            inputs' Hessian, or ones.
    """
    groups = grouped(weight.float(), low_bit)
    cost = grouped(columns_weight.float().unsqueeze(0), low_bit)
    low, high = groups.amin(-1), groups.amax(-1)
    top = 2**low_bit.bits - 1
    scale = ((high - low).amax(1) * _RANGE_SHARE / top).clamp(_LEAST_SCALE).to(torch.float16)
    reach = float(zero_of(torch.tensor([ZEROS // 2, 0]), low_bit).diff().abs())
    best = torch.full(low.shape, torch.inf, device=weight.device)
    none = torch.zeros(low.shape, dtype=torch.uint8, device=low.device)
    grid = Grid(none, none.clone(), scale)
    # The step at which the codes just span the group, and from there on to those that clip it.
    ratio = -float(torch.log2(step_of(torch.tensor(1))))
    spanning = (scale.float().unsqueeze(1) * top / (high - low).clamp(_LEAST_SCALE)).log2() / ratio
    for shift in _STEP_TRIES[low_bit.bits]:
        index = (spanning.floor() + shift).clamp(0, STEPS - 1).to(torch.uint8)
        step = group_steps(index, scale)
        wanted = ZEROS // 2 - ((high + low) / 2 / step / reach * (ZEROS // 2)).round()
        for away in _ZERO_TRIES:
            zero = (wanted + away).clamp(0, ZEROS - 1).to(torch.uint8)
            place = zero_of(zero, low_bit).unsqueeze(-1)
            wide = step.unsqueeze(-1)
            rounded = (groups / wide).add_(place).round_().clamp_(0, top).sub_(place).mul_(wide)
            error = rounded.sub_(groups).square_().mul_(cost).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            grid.step[better] = index[better]
            grid.zero[better] = zero[better]
    return grid


def grouped(weight: torch.Tensor, low_bit: LowBit) -> torch.Tensor:
    """A weight's rows in groups, the last one filled up with zeros: (rows, groups, group_size)."""
    rows, columns = weight.shape
    filled = torch.nn.functional.pad(weight, (0, low_bit.padded(columns) - columns))
    return filled.reshape(rows, -1, low_bit.group_size)


def round_to_grid(weight: torch.Tensor, grid: Grid, low_bit: LowBit) -> Codes:
    """The nearest code of each weight."""
    groups = grouped(weight.float(), low_bit)
    codes = groups / grid.steps().unsqueeze(-1) + grid.zeros(low_bit).unsqueeze(-1)
    codes = codes.round_().clamp_(0, 2**low_bit.bits - 1).to(torch.uint8)
    return Codes(codes.reshape(weight.shape[0], -1), grid.step, grid.zero, grid.scale)


def round_nearest(weight: torch.Tensor, low_bit: LowBit) -> Codes:
    """Round each weight by itself; needs no text."""
    ones = torch.ones(weight.shape[1], device=weight.device)
    return round_to_grid(weight, choose_grid(weight, low_bit, ones), low_bit)


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
    return _Columns.of(hessian, dampening, where).round(weight.float(), low_bit, block_columns)


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
    columns = _Columns.of(hessian, dampening, where)
    outputs = Hessian(len(weight), weight.device)
    largest = gradients.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    outputs.add(gradients.to(weight.device, torch.float32) / largest)
    order, upper = _in_order(outputs, _OUTPUT_DAMPENING, f"{where}: its outputs")
    left = weight.float()[order]
    size = max(_LEAST_BLOCK_ROWS, -(-len(weight) // _MOST_ROW_BLOCKS))
    parts = []
    for begin in range(0, len(left), size):
        end = begin + size
        block = left[begin:end]
        codes = columns.round(block, low_bit, block_columns)
        parts.append(codes)
        error = block - dequantize(codes, low_bit, block.shape[1], torch.float32)
        within = upper[begin:end, begin:end]
        whitened = torch.linalg.solve_triangular(within.T, error, upper=False)
        left[end:].addmm_(upper[begin:end, end:].T, whitened, alpha=-1)
    return _rows_put_back(parts, order)


def _rows_put_back(parts: list[Codes], order: torch.Tensor) -> Codes:
    """One weight's codes from those of its blocks of rows, which are in another order."""
    back = torch.argsort(order)

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])[back]

    return Codes(*(joined(field.name) for field in fields(Codes)))


def _in_order(hessian: Hessian, dampening: float, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Places by falling diagonal, and the factor of the inverse in that order."""
    order = torch.argsort(hessian.total.diagonal(), descending=True, stable=True)
    ordered = Hessian(len(order), hessian.total.device)
    ordered.total = hessian.total[order][:, order]
    return order, inverse_factor(ordered, dampening, where).upper


@dataclass(frozen=True)
class _Columns:
    """What rounding column by column needs of the inputs; it serves any rows.

    Attributes:
        costs: What an error in each column costs, shape (columns,).
        order: The columns as they are rounded.
        upper: Factor of the inverse Hessian, in that order.
    """

    costs: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, hessian: Hessian, dampening: float, where: str) -> Self:
        """Prepare a Hessian, which is left as it is.

        Raises:
            LoramError: It is not finite or has no inverse.
        """
        return cls(hessian.total.diagonal(), *_in_order(hessian, dampening, where))

    def round(self, weight: torch.Tensor, low_bit: LowBit, block_columns: int) -> Codes:
        """Codes of rows in fp32, each column's error fed to those that follow."""
        grid = choose_grid(weight, low_bit, self.costs)
        group = self.order // low_bit.group_size
        steps, zeros = grid.steps()[:, group], grid.zeros(low_bit)[:, group]
        left = weight[:, self.order]
        codes = torch.empty_like(left)
        top = 2**low_bit.bits - 1
        for begin in range(0, left.shape[1], block_columns):
            end = min(begin + block_columns, left.shape[1])
            block, inverse = left[:, begin:end].clone(), self.upper[begin:end, begin:end]
            errors = torch.empty_like(block)
            for i in range(end - begin):
                step, zero = steps[:, begin + i], zeros[:, begin + i]
                code = (block[:, i] / step + zero).round_().clamp_(0, top)
                codes[:, begin + i] = code
                errors[:, i] = (block[:, i] - (code - zero) * step) / inverse[i, i]
                block[:, i + 1 :].addr_(errors[:, i], inverse[i, i + 1 :], alpha=-1)
            left[:, end:].addmm_(errors, self.upper[begin:end, end:], alpha=-1)
        placed = torch.empty_like(codes)
        placed[:, self.order] = codes
        return replace(
            round_to_grid(weight, grid, low_bit),
            codes=grouped(placed, low_bit).to(torch.uint8).reshape(weight.shape[0], -1),
        )
