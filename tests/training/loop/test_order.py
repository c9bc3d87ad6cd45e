from collections import Counter

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from loram_cli.reporting import NullReporter
from loram_cli.training.loop.loop import fit_lora
from loram_cli.training.loop.options import FitOptions
from loram_cli.training.loop.order import EndlessOrder
from loram_cli.training.loop.trainer import StepTrainer


def drawn(order: EndlessOrder, rounds: int) -> list[list[int]]:
    found = []
    for number in range(rounds):
        order.set_epoch(number)
        found.append(list(order))
        assert len(found[-1]) == len(order)
    return found


def strung(order: EndlessOrder) -> list[int]:
    return [row for rows in drawn(order, 12) for row in rows]


@pytest.mark.parametrize(("rows", "batch"), [(9, 8), (8, 8), (8, 128), (25, 4), (1, 3), (7, 7)])
def test_rounds_are_whole_batches_of_epochs_strung_together(rows, batch):
    order = EndlessOrder(rows, batch, seed=3)
    assert len(order) % batch == 0
    string = strung(order)
    for begin in range(0, len(string) - rows + 1, rows):
        assert sorted(string[begin : begin + rows]) == list(range(rows))
    # In any order of asking, as a resumed training does.
    order.set_epoch(5)
    assert list(order) == string[5 * len(order) : 6 * len(order)]
    assert rows == 1 or string != strung(EndlessOrder(rows, batch, seed=4))


def test_a_batch_that_divides_the_rows_sees_the_epochs_that_accelerate_draws():
    torch.manual_seed(42)
    theirs = SeedableRandomSampler(range(24))
    epochs = []
    for epoch in range(3):
        theirs.set_epoch(epoch)
        epochs.append(list(theirs))
    assert drawn(EndlessOrder(24, 8, seed=42), 3) == epochs


@pytest.mark.parametrize(("count", "batch"), [(3, 8), (9, 8), (16, 8)])
def test_every_step_learns_exactly_a_batch(with_lora, rows, tmp_path, monkeypatch, count, batch):
    seen: list[list[int]] = []
    theirs = StepTrainer.get_batch_samples

    def spy(self, *args, **kwargs):
        batches, tokens = theirs(self, *args, **kwargs)
        seen.append([len(b["input_ids"]) for b in batches])
        return batches, tokens

    monkeypatch.setattr(StepTrainer, "get_batch_samples", spy)
    options = FitOptions(
        learning_rate=1e-3, steps=5, batch=batch, micro_batch=4, warmup_steps=0, seed=1
    )
    result = fit_lora(with_lora(), rows[:count], [], options, tmp_path, NullReporter())
    assert result.steps == 5
    assert Counter(map(tuple, seen)) == {(4, 4): 5}
