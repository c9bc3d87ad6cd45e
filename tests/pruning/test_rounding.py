"""Rounding to few bits: the grid against all of its points, the sweep against GPTQ written plainly."""

import itertools

import pytest
import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import STEPS, ZEROS, dequantize
from loram_cli.errors import LoramError
from loram_cli.pruning.rounding import (
    Grid,
    choose_grid,
    grouped,
    round_nearest,
    round_to_grid,
    round_with_feedback,
)
from loram_cli.pruning.sparsegpt import Hessian

ROWS, COLUMNS = 6, 40


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(10, COLUMNS, generator=generator)
    inputs = torch.randn(300, 10, generator=generator) @ mixing
    inputs += 0.5 * torch.randn(300, COLUMNS, generator=generator)
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs


def hessian_of(inputs: torch.Tensor) -> Hessian:
    hessian = Hessian(COLUMNS, "cpu")
    hessian.add(inputs)
    return hessian


def floating(codes, low_bit: LowBit) -> torch.Tensor:
    return dequantize(codes, low_bit, COLUMNS, torch.float32)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_grid_is_near_the_best_of_all_steps_and_zeros(bits: int):
    low_bit, (weight, _) = LowBit(bits, 40), problem()
    ones = torch.ones(COLUMNS)
    grid = choose_grid(weight, low_bit, ones)
    best = torch.full((ROWS, 1), torch.inf)
    for step, zero in itertools.product(range(STEPS), range(ZEROS)):
        tried = Grid(torch.full_like(grid.step, step), torch.full_like(grid.zero, zero), grid.scale)
        error = floating(round_to_grid(weight, tried, low_bit), low_bit) - weight
        best = torch.minimum(best, grouped(error, low_bit).square().sum(-1))
    found = floating(round_to_grid(weight, grid, low_bit), low_bit) - weight
    chosen = grouped(found, low_bit).square().sum(-1)
    assert torch.all(chosen >= best * 0.9999)
    assert chosen.sum() <= 1.1 * best.sum()


def plain_gptq(weight, hessian, grid, low_bit: LowBit, dampening: float) -> torch.Tensor:
    """Column by column, the inverse over the columns that are left made anew each time."""
    total = hessian.total.double()
    order = torch.argsort(hessian.total.diagonal(), descending=True, stable=True).tolist()
    total = total + dampening * total.diagonal().mean() * torch.eye(COLUMNS, dtype=total.dtype)
    left, steps, zeros = weight.double(), grid.steps().double(), grid.zeros(low_bit).double()
    out = torch.empty_like(left)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(total[rest][:, rest])
        group = column // low_bit.group_size
        code = (left[:, column] / steps[:, group] + zeros[:, group]).round()
        code = code.clamp(0, 2**low_bit.bits - 1)
        out[:, column] = (code - zeros[:, group]) * steps[:, group]
        error = (left[:, column] - out[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0][None, :]
    return out


@pytest.mark.parametrize("block", [8, 128])
def test_the_sweep_is_gptq(block: int):
    low_bit, (weight, inputs) = LowBit(3, 8), problem()
    hessian = hessian_of(inputs)
    before = hessian.total.clone()
    found = floating(
        round_with_feedback(weight, hessian, low_bit, 0.01, "here", block_columns=block), low_bit
    )
    assert torch.equal(hessian.total, before)
    grid = choose_grid(weight, low_bit, hessian.total.diagonal())
    expected = plain_gptq(weight, hessian, grid, low_bit, 0.01)
    # A tie may fall the other way in fp32, and moves all that follows it.
    assert (found - expected).abs().lt(1e-4).float().mean() > 0.98


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_halves_the_error_of_the_output(bits: int):
    low_bit, (weight, inputs) = LowBit(bits, 16), problem()

    def error(codes) -> float:
        return float((inputs @ (floating(codes, low_bit) - weight).T).square().sum())

    fed = round_with_feedback(weight, hessian_of(inputs), low_bit, 0.01, "here")
    assert error(fed) < 0.5 * error(round_nearest(weight, low_bit))


def test_more_bits_are_nearer_and_zeros_stay_zeros():
    weight, _ = problem()
    errors = [
        float((floating(round_nearest(weight, LowBit(bits, 8)), LowBit(bits, 8)) - weight).norm())
        for bits in (2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    nothing = floating(round_nearest(torch.zeros(2, COLUMNS), LowBit(2, 8)), LowBit(2, 8))
    assert nothing.abs().max() < 1e-6


def test_inputs_that_are_not_finite_are_named():
    weight, inputs = problem()
    hessian = hessian_of(inputs)
    hessian.total[0, 0] = torch.nan
    with pytest.raises(LoramError, match="layer 3: its inputs"):
        round_with_feedback(weight, hessian, LowBit(2, 8), 0.01, "layer 3")
