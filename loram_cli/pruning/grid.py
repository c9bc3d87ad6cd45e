"""Rounding to a grid: a step and a zero for each group, and column by column with feedback.

The steps and zeros that a group can have are few (:mod:`loram_cli.checkpoint.low_bit_codes`), so
that the best are found by trying them, on the rounded weight itself, and not by its extremes: that
is what HQQ's solver (Badri and Shaji, "Half-Quadratic Quantization", 2023) does in its way.
"""

from dataclasses import dataclass, replace

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import (
    STEPS,
    ZEROS,
    Codes,
    group_steps,
    step_of,
    zero_of,
)
from loram_cli.pruning.columns import LEAST_SCALE, Columns
from loram_cli.pruning.sparsegpt import falling

# Of the widest group's range: a little less costs its outermost weights, and serves all others.
_RANGE_SHARE = 0.95
# Zeros that are tried: the one that the group's extremes ask for, and those beside it.
_ZERO_TRIES = (-2, -1, 0, 1, 2)
# Steps that are tried, by bits: the fewer codes there are, the more of its range a group gives up.
_STEP_TRIES = {2: range(2, 8), 3: range(4), 4: range(-1, 3)}


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

    def steps(self, low_bit: LowBit) -> torch.Tensor:
        """Each group's step, fp32."""
        return group_steps(self.step, self.scale, low_bit)

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
    scale = ((high - low).amax(1) * _RANGE_SHARE / top).clamp(LEAST_SCALE).to(torch.float16)
    reach = float(zero_of(torch.tensor([ZEROS // 2, 0]), low_bit).diff().abs())
    best = torch.full(low.shape, torch.inf, device=weight.device)
    none = torch.zeros(low.shape, dtype=torch.uint8, device=low.device)
    grid = Grid(none, none.clone(), scale)
    # The step at which the codes just span the group, and from there on to those that clip it.
    ratio = -float(torch.log2(step_of(torch.tensor(1), low_bit)))
    spanning = (scale.float().unsqueeze(1) * top / (high - low).clamp(LEAST_SCALE)).log2() / ratio
    for shift in _STEP_TRIES[low_bit.bits]:
        index = (spanning.floor() + shift).clamp(0, STEPS["grid"] - 1).to(torch.uint8)
        step = group_steps(index, scale, low_bit)
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
    codes = groups / grid.steps(low_bit).unsqueeze(-1) + grid.zeros(low_bit).unsqueeze(-1)
    codes = codes.round_().clamp_(0, 2**low_bit.bits - 1).to(torch.uint8)
    return Codes(codes.reshape(weight.shape[0], -1), grid.step, grid.zero, grid.scale)


class GridColumns(Columns):
    """Rounding column by column to a grid, by falling cost."""

    @staticmethod
    def order_of(costs: torch.Tensor, low_bit: LowBit) -> torch.Tensor:
        """Each column by itself."""
        return falling(costs)

    @staticmethod
    def nearest(weight: torch.Tensor, low_bit: LowBit) -> Codes:
        """The nearest codes on the grid with the least squared error."""
        ones = torch.ones(weight.shape[1], device=weight.device)
        return round_to_grid(weight, choose_grid(weight, low_bit, ones), low_bit)

    def round(self, weight: torch.Tensor) -> Codes:
        """Codes of rows in fp32, each column's error fed to those that follow."""
        low_bit, block_columns = self.low_bit, self.block_columns
        grid = choose_grid(weight, low_bit, self.costs)
        group = self.order // low_bit.group_size
        steps, zeros = grid.steps(low_bit)[:, group], grid.zeros(low_bit)[:, group]
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
