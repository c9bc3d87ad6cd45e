"""Rounding to few bits: the grid against all of its points, the sweep against GPTQ written plainly."""

import itertools

import pytest
import torch
from helpers.hessians import hessian_of

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import STEPS, ZEROS, dequantize
from loram_cli.errors import LoramError
from loram_cli.pruning import rounding
from loram_cli.pruning.grid import Grid, choose_grid, grouped, round_to_grid
from loram_cli.pruning.rounding import round_nearest, round_on_both_sides, round_with_feedback

ROWS, COLUMNS = 6, 40


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(10, COLUMNS, generator=generator)
    inputs = torch.randn(300, 10, generator=generator) @ mixing
    inputs += 0.5 * torch.randn(300, COLUMNS, generator=generator)
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs


def floating(codes, low_bit: LowBit) -> torch.Tensor:
    return dequantize(codes, low_bit, COLUMNS, torch.float32)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_grid_is_near_the_best_of_all_steps_and_zeros(bits: int):
    low_bit, (weight, _) = LowBit(bits, 40), problem()
    ones = torch.ones(COLUMNS)
    grid = choose_grid(weight, low_bit, ones)
    best = torch.full((ROWS, 1), torch.inf)
    for step, zero in itertools.product(range(STEPS["grid"]), range(ZEROS)):
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
    left, steps, zeros = weight.double(), grid.steps(low_bit).double(), grid.zeros(low_bit).double()
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


def both_sided_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight of three blocks of rows, inputs, and gradients with few large directions."""
    generator = torch.Generator().manual_seed(1)
    rows = 80
    weight = torch.randn(rows, COLUMNS, generator=generator)
    mixing = torch.randn(12, rows, generator=generator)
    gradients = torch.randn(300, 12, generator=generator) @ mixing
    gradients += 0.2 * torch.randn(300, rows, generator=generator)
    return weight, problem()[1], 1e-7 * gradients


def moment_of(gradients: torch.Tensor, dampening: float) -> torch.Tensor:
    total = gradients.double().T @ gradients.double()
    return total + dampening * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)


def test_both_sides_is_gptq_on_rows_that_make_up_for_the_rows_before():
    """Rows that are left take the best continuous answer to all errors so far, made anew each time."""
    low_bit, (weight, inputs, gradients) = LowBit(2, 8), both_sided_problem()
    moment = moment_of(gradients, rounding._OUTPUT_DAMPENING)
    order = torch.argsort(gradients.square().sum(0), descending=True, stable=True).tolist()
    expected = torch.empty_like(weight)
    for begin in range(0, len(weight), 32):
        done, now = order[:begin], order[begin : begin + 32]
        rest = order[begin:]
        errors = weight[done].double() - expected[done].double()
        moved = torch.linalg.solve(moment[rest][:, rest], moment[rest][:, done] @ errors)
        block = weight[now] + moved[: len(now)].float()
        codes = round_with_feedback(block, hessian_of(inputs), low_bit, 0.01, "here")
        expected[now] = floating(codes, low_bit)
    codes = round_on_both_sides(weight, hessian_of(inputs), gradients, low_bit, 0.01, "here")
    # A tie may fall the other way in fp32, and moves all that follows it.
    assert (floating(codes, low_bit) - expected).abs().lt(1e-4).float().mean() > 0.97


def test_both_sides_changes_the_loss_less():
    low_bit, (weight, inputs, gradients) = LowBit(2, 8), both_sided_problem()

    def change(codes) -> float:
        error = floating(codes, low_bit) - weight
        return float((gradients @ error @ inputs.T).square().sum())

    hessian = hessian_of(inputs)
    both = round_on_both_sides(weight, hessian, gradients, low_bit, 0.01, "here")
    assert change(both) < 0.5 * change(round_with_feedback(weight, hessian, low_bit, 0.01, "here"))


def test_gradients_of_nothing_are_gptq():
    low_bit, (weight, inputs) = LowBit(2, 8), problem()
    nothing = torch.zeros(5, ROWS, dtype=torch.bfloat16)
    both = round_on_both_sides(weight, hessian_of(inputs), nothing, low_bit, 0.01, "here")
    fed = round_with_feedback(weight, hessian_of(inputs), low_bit, 0.01, "here")
    assert torch.equal(both.codes, fed.codes)
