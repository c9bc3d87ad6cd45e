import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.evaluation import batching
from loram_cli.evaluation.batching import GrowingBatch, bytes_per_token

CPU = torch.device("cpu")


def sizes(batch, items, fits):
    """Rows of each pass, where passes of more than ``fits`` rows run out of memory."""
    seen, done = [], []

    def work(rows):
        seen.append(len(rows))
        if len(rows) > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        done.extend(rows)

    list(batch.run(range(items), lambda _: 10, work))
    assert done == list(range(items))
    return seen


def test_auto_grows_and_halves(monkeypatch):
    monkeypatch.setattr(batching, "_spare_bytes", lambda _: 10**9)
    assert sizes(GrowingBatch(None, CPU, 1), 200, 10**9) == [8, 16, 32, 64, 80]
    assert sizes(GrowingBatch(None, CPU, 1), 60, 20) == [8, 16, 32, 16, 16, 4]


def test_growth_stops_where_memory_ends(monkeypatch):
    # 10 tokens a row at 100 bytes: sixteen rows take 16000 bytes.
    monkeypatch.setattr(batching, "_spare_bytes", lambda _: 20_000)
    assert sizes(GrowingBatch(None, CPU, 100), 50, 10**9) == [8, 16, 16, 10]


def test_the_first_batch_is_no_larger_than_memory(monkeypatch):
    for spare_bytes, first in ((0, 1), (3_500, 3), (10**6, 8)):
        monkeypatch.setattr(batching, "_spare_bytes", lambda _, spare=spare_bytes: spare)
        assert sizes(GrowingBatch(None, CPU, 100), 20, 10**9)[0] == first


def test_a_given_number_is_the_most(monkeypatch):
    monkeypatch.setattr(batching, "_spare_bytes", lambda _: 0)
    assert sizes(GrowingBatch(7, CPU, 1), 20, 10**9) == [7, 7, 6]
    # After four passes that went well it dares as many rows again.
    assert sizes(GrowingBatch(8, CPU, 1), 40, 6)[:9] == [8, 4, 4, 4, 4, 8, 4, 4, 4]


def test_one_row_too_many_is_an_error():
    with pytest.raises(LoramError, match="one row of 10 tokens"):
        sizes(GrowingBatch(4, CPU, 1), 4, 0)


def test_other_errors_pass():
    def work(_):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        list(GrowingBatch(4, CPU, 1).run([1], lambda _: 1, work))


def test_estimate_covers_keys_values_and_logits(model):
    # 3 layers, 2 key/value heads of 8, keys and values, float32.
    assert bytes_per_token(model, scoring=False) > 2 * 3 * 2 * 8 * 4
    extra = bytes_per_token(model, scoring=True) - bytes_per_token(model, scoring=False)
    assert extra == model.config.vocab_size * 12
