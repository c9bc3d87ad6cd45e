"""SparseGPT's blocked sweep against the paper's Algorithm 1 written plainly."""

import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.pruning.sparsegpt import Hessian, inverse_factor, sparsegpt, working_bytes
from loram_cli.pruning.sparsity import (
    lowest,
    lowest_of_four,
    magnitude_mask,
    zeros_wanted,
)

ROWS, COLUMNS, TOKENS = 12, 40, 200


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator) @ (mixing + torch.eye(COLUMNS))
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs


def plain(weight, inputs, *, sparsity, semi, block, dampening=0.01):
    """Column by column, with the inverse over the columns that are left made anew each time."""
    w, x = weight.double(), inputs.double()
    hessian = 2 * x.T @ x
    hessian += dampening * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=w.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(w.shape[1])]
    zero = torch.zeros_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        width = 4 if semi else block
        if j % width == 0:
            columns = range(j, min(j + width, w.shape[1]))
            cost = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in columns], dim=1)
            if semi:
                for row in range(len(w)):
                    for c in cost[row].argsort()[:2].tolist():
                        zero[row, j + c] = True
            else:
                before = int(zero.sum())
                wanted = int(len(w) * columns.stop * sparsity + 1e-9) - before
                for flat in cost.flatten().argsort()[:wanted].tolist():
                    zero[flat // len(columns), j + flat % len(columns)] = True
        error = torch.where(zero[:, j], w[:, j], 0) / inverses[j][0, 0]
        w[:, j:] -= error[:, None] * inverses[j][0][None, :]
    return w.masked_fill(zero, 0), zero


def ours(weight, inputs, *, sparsity, semi, block, dampening=0.01):
    hessian = Hessian(COLUMNS, "cpu")
    for part in inputs.split(64):
        hessian.add(part[None])
    factor = inverse_factor(hessian, dampening, "here")
    return sparsegpt(weight, factor, sparsity, semi=semi, block_columns=block)


@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize(
    ("sparsity", "semi"), [(0.5, False), (0.55, False), (0.9, False), (0.5, True)]
)
def test_equal_to_the_plain_algorithm(sparsity, semi, block):
    weight, inputs = problem()
    settings = {"sparsity": sparsity, "semi": semi, "block": block}
    expected, zero = plain(weight, inputs, **settings)
    found = ours(weight, inputs, **settings)
    assert torch.equal(found == 0, zero)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("semi", [True, False])
def test_less_error_than_magnitude(semi):
    weight, _ = problem(1)
    generator = torch.Generator().manual_seed(1)
    # Features that vary together, as a language model's do.
    inputs = torch.randn(TOKENS, 10, generator=generator) @ torch.randn(
        10, COLUMNS, generator=generator
    )
    inputs += 0.5 * torch.randn(TOKENS, COLUMNS, generator=generator)
    found = ours(weight, inputs, sparsity=0.5, semi=semi, block=128)
    plainly = weight.masked_fill(magnitude_mask(weight, 0.5, semi=semi), 0)
    errors = [((w - weight) @ inputs.T).square().sum() for w in (found, plainly)]
    assert errors[0] < 0.7 * errors[1]


def test_inputs_that_never_fire_are_dropped_and_harmless():
    weight, inputs = problem(2)
    inputs[:, 5] = 0
    found = ours(weight, inputs, sparsity=0.5, semi=False, block=128)
    assert found.isfinite().all() and (found[:, 5] == 0).all()


def test_a_hessian_without_an_inverse_names_the_flag():
    hessian = Hessian(4, "cpu")
    hessian.total.fill_(1.0).diagonal().fill_(0.5)
    with pytest.raises(LoramError, match="raise --dampening"):
        inverse_factor(hessian, 0.01, "here")


def test_inputs_that_are_not_finite_are_named():
    hessian = Hessian(2, "cpu")
    hessian.add(torch.tensor([[float("inf"), 1.0]]))
    with pytest.raises(LoramError, match="layer x: its inputs"):
        inverse_factor(hessian, 0.01, "layer x")


def test_counts_are_exact_and_ties_go_low():
    assert zeros_wanted(100, 0.29) == 29
    scores = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 2.0]])
    assert lowest(scores, 3).tolist() == [[True, True, True], [False, False, False]]
    assert lowest(scores, 0).sum() == 0 and lowest(scores, 6).all()
    assert lowest_of_four(torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, 9.0, 8.0, 7.0]])).tolist() == [
        [False, True, True, False, True, False, False, True]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_zeroes_the_smallest(dtype):
    weight = problem(3)[0].to(dtype)
    mask = magnitude_mask(weight, 0.55, semi=False)
    assert mask.sum() == int(ROWS * COLUMNS * 0.55)
    assert weight[mask].abs().max() <= weight[~mask].abs().min()
    four = magnitude_mask(weight, 0.5, semi=True)
    assert (four.reshape(-1, 4).sum(dim=1) == 2).all()


def test_working_memory_is_all_hessians_and_the_factoring_of_one():
    # Llama-2-7B: q, k and v share their input; o; gate and up share theirs; down.
    hidden, intermediate = 4096, 11008
    layer = [(hidden, hidden), (hidden, hidden), (hidden, intermediate), (intermediate, hidden)]
    first = 3 * hidden**2 + intermediate**2 + 3 * hidden**2
    assert working_bytes(layer) == 4 * max(first, 4 * intermediate**2) == 4 * 4 * intermediate**2
    # Where no input is much wider, the first is the peak: the others' sums are waiting.
    assert working_bytes([(10, 10)] * 3) == 4 * (2 * 100 + 4 * 100)
    # And a module of very many rows is held once more in fp32.
    assert working_bytes([(10, 500)]) == 4 * (2 * 100 + 5000)
