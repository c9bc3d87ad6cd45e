"""The search for a trellis' codes, against all codes and against a search written plainly."""

import itertools

import pytest
import torch
from helpers.hessians import hessian_of

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import dequantize
from loram_cli.checkpoint.trellis import table, values_of
from loram_cli.pruning import trellis
from loram_cli.pruning.columns import Columns, RowFeed
from loram_cli.pruning.rounding import round_nearest, round_on_both_sides, round_with_feedback
from loram_cli.pruning.trellis import TrellisColumns, best_codes


def feed_of(columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(columns, columns, generator=generator)
    return (0.3 * drawn).triu(1) + torch.diag(0.5 + drawn.diagonal().abs())


def cost(wanted: torch.Tensor, codes: torch.Tensor, bits: int, feed: torch.Tensor) -> torch.Tensor:
    values = values_of(codes.unsqueeze(1), bits, torch.float32)[:, 0]
    return ((wanted - values) @ feed).square().sum(1)


def test_without_feedback_no_codes_are_better():
    wanted = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    every = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.uint8)
    eye = torch.eye(8)
    for row in wanted:
        found = cost(row[None], best_codes(row[None], 2), 2, eye)
        best = cost(row.expand(len(every), -1), every, 2, eye).min()
        assert found.item() == pytest.approx(best.item(), rel=1e-5)


def test_with_feedback_few_codes_are_better():
    wanted, feed = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), feed_of(8)
    every = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.uint8)
    found = cost(wanted, best_codes(wanted, 2, feed), 2, feed)
    costs = torch.stack([cost(row.expand(len(every), -1), every, 2, feed) for row in wanted])
    assert torch.all(found <= 1.5 * costs.min(1).values)
    assert torch.all((costs < found[:, None]).float().mean(1) < 1e-3)


def plain_search(wanted: list[float], bits: int, feed: torch.Tensor) -> list[int]:
    """One row: every survivor keeps its codes, and its cost is worked out anew from them."""
    values, choices = table(bits), 2**bits
    survivors: dict[int, tuple[float, list[int], list[float]]] = {0: (0.0, [], [])}
    left = len(values) // choices
    for column, number in enumerate(wanted):
        after: dict[int, tuple[float, list[int], list[float]]] = {}
        for place, (so_far, codes, errors) in survivors.items():
            for code in range(choices):
                error = number - float(values[place * choices + code])
                fed = sum(e * float(feed[i, column]) for i, e in enumerate(errors))
                spent = so_far + (fed + error * float(feed[column, column])) ** 2
                end = (place * choices + code) % left
                if end not in after or spent < after[end][0]:
                    after[end] = (spent, [*codes, code], [*errors, error])
        survivors = after
    return min(survivors.values(), key=lambda s: s[0])[1]


@pytest.mark.parametrize("columns", [8, 40])
def test_each_survivor_carries_its_own_errors(columns: int):
    """Also from one block of columns to the next."""
    wanted, feed = (
        torch.randn(2, columns, generator=torch.Generator().manual_seed(3)),
        feed_of(columns),
    )
    found = best_codes(wanted, 4, feed)
    assert found.tolist() == [plain_search(row, 4, feed) for row in wanted.tolist()]


def problem(columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, inputs and gradients with few large directions."""
    generator = torch.Generator().manual_seed(4)

    def drawn(count: int, width: int) -> torch.Tensor:
        mixing = torch.randn(8, width, generator=generator)
        few = torch.randn(count, 8, generator=generator) @ mixing
        return few + 0.4 * torch.randn(count, width, generator=generator)

    return torch.randn(72, columns, generator=generator), drawn(300, columns), drawn(200, 72)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [128, 104])
def test_errors_shrink_by_feedback_and_beside_a_grid(bits: int, columns: int):
    weight, inputs, gradients = problem(columns)
    errors = {}
    for codes in ("grid", "trellis"):
        low_bit = LowBit(bits, 64, codes)
        how = (low_bit, 0.01, "here")
        rounded = {
            "nearest": round_nearest(weight, low_bit),
            "gptq": round_with_feedback(weight, hessian_of(inputs), *how),
            "yaqa": round_on_both_sides(weight, hessian_of(inputs), gradients, *how),
        }
        for name, found in rounded.items():
            error = dequantize(found, low_bit, columns, torch.float32) - weight
            errors[codes, name] = (
                float(error.square().sum()),
                float((inputs @ error.T).square().sum()),
                float((gradients @ error @ inputs.T).square().sum()),
            )
    # What each of them makes small; a grid has a zero for each group as well.
    for place, name in enumerate(("nearest", "gptq", "yaqa")):
        assert errors["trellis", name][place] < 0.95 * errors["grid", name][place], name
    assert errors["trellis", "gptq"][1] < 0.1 * errors["trellis", "nearest"][1]
    assert errors["trellis", "yaqa"][2] < 0.4 * errors["trellis", "gptq"][2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sets_of_rows_have_their_own_feed(bits: int, monkeypatch):
    wanted = torch.randn(12, 24, generator=torch.Generator().manual_seed(3))
    feeds = torch.stack([feed_of(24, seed) for seed in range(3)])
    each = [best_codes(rows, bits, feed) for rows, feed in zip(wanted.split(4), feeds, strict=True)]
    assert torch.equal(best_codes(wanted, bits, feeds), torch.cat(each))
    monkeypatch.setitem(trellis._ROWS_TOGETHER, "cpu", 8)
    assert torch.equal(best_codes(wanted, bits, feeds), torch.cat(each))


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("together", [3, 5, 10])
def test_no_search_has_more_rows_than_go_together(sets: int, together: int, monkeypatch):
    wanted = torch.randn(12, 24, generator=torch.Generator().manual_seed(3))
    feeds = torch.stack([feed_of(24, seed) for seed in range(sets)])
    expected, rows, search = best_codes(wanted, 2, feeds), [], trellis._Search

    def counted(part, *how):
        rows.append(len(part))
        return search(part, *how)

    monkeypatch.setattr(trellis, "_Search", counted)
    monkeypatch.setitem(trellis._ROWS_TOGETHER, "cpu", together)
    assert torch.equal(best_codes(wanted, 2, feeds), expected)
    assert max(rows) <= together
    assert sum(rows) == 12


def test_diagonals_are_the_sweep_of_one_block_of_rows_after_the_other(monkeypatch):
    """The last block of rows and the last group of columns are smaller than the others."""
    low_bit, (weight, inputs, gradients) = LowBit(2, 32, "trellis"), problem(104)
    searches = []

    def counted(wanted, *how):
        searches.append(len(wanted))
        return best_codes(wanted, *how)

    # A row's scale is that of its weights alone, whatever rows before it have fed to it.
    monkeypatch.setattr(trellis, "_spread", lambda part: part.new_full(part.shape[:-1], 0.5))
    columns = TrellisColumns.of(hessian_of(inputs), low_bit, 0.01, "here", 128)
    moment = gradients.T @ gradients
    upper = torch.linalg.cholesky(torch.linalg.inv(moment + 0.1 * moment.diagonal().mean()
                                                   * torch.eye(72)), upper=True)  # fmt: skip
    rows = RowFeed(upper, 20)
    assert [block.stop for block in rows.blocks] == [20, 40, 60, 72]
    expected = Columns.round_rows(columns, weight.clone(), rows)
    monkeypatch.setattr(trellis, "best_codes", counted)
    found = columns.round_rows(weight.clone(), rows)
    # A tie may fall the other way in fp32, and moves all that follows it.
    assert found.codes.eq(expected.codes).float().mean() > 0.97
    assert found.step.eq(expected.step).float().mean() > 0.97
    # Four blocks and four groups on seven diagonals; what is smaller is searched apart.
    assert max(searches) >= 40
    assert len(searches) < 4 * 4
    assert sum(searches) == 72 * 4


def test_zeros_and_far_weights_are_kept():
    low_bit = LowBit(2, 16, "trellis")
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    weight[0] = 0
    weight[1, :16] /= 50
    found = dequantize(round_nearest(weight, low_bit), low_bit, 32, torch.float32)
    assert found[0].abs().max() < 1e-6
    near = (found[1, :16] - weight[1, :16]).square().sum() / weight[1, :16].square().sum()
    assert near < 0.2
