"""Data that outgrows its memory goes on in a file, and is the same."""

import json
import subprocess
import sys

import pytest

from loram_cli.training.data import spool
from loram_cli.training.data.documents import load_instructions, split_eval
from loram_cli.training.data.sources import mix
from loram_cli.training.data.spool import Chain, Spool, Subset, spooled
from loram_cli.training.data.tokens import tokenize_examples
from loram_cli.training.loop.job import text_job


@pytest.fixture
def source(tmp_path):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1) * (1 + i % 5)} for i in range(2000)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_spool_is_a_sequence_wherever_its_items_are():
    for memory in (0, 100, 10**6):
        items = Spool(len, memory)
        for i in range(700):
            items.append(f"item {i}")
        assert items.on_disk is (memory < 10**6)
        wanted = [f"item {i}" for i in range(700)]
        assert list(items) == wanted and len(items) == 700
        assert (items[0], items[-1], items[255], items[699]) == (
            wanted[0], wanted[-1], wanted[255], wanted[699]
        )  # fmt: skip
        assert list(items[600:]) == wanted[600:] and list(items[::-100]) == wanted[::-100]
        with pytest.raises(IndexError):
            items[700]
        both = Chain([items, ["last"]])
        assert (both[699], both[700], len(both)) == (wanted[-1], "last", 701)
        assert list(Subset(both, [700, 0])) == ["last", "item 0"]
    assert spooled(iter("abc"), len) == ["a", "b", "c"]


def test_training_data_in_a_file_gives_the_same_rows(source, tokenizer, reporter, monkeypatch):
    def rows():
        examples = load_instructions(source, tokenizer=tokenizer)
        train, held_out = split_eval(examples, 50, 3)
        made = tokenize_examples(train, tokenizer, 64, reporter)
        evaluated = tokenize_examples(held_out, tokenizer, 64, reporter)
        return made, text_job(made, evaluated, "train")

    kept, job = rows()
    monkeypatch.setattr(spool, "MEMORY_BYTES", 4096)
    stored, again = rows()
    assert isinstance(kept, list) and not isinstance(stored, list)
    assert again.digest == job.digest
    assert (again.highest_token, again.longest) == (job.highest_token, job.longest)
    assert [row.input_ids.tolist() for row in stored] == [row.input_ids.tolist() for row in kept]


def test_a_mixture_in_files_is_the_mixture_in_memory(source, tokenizer, monkeypatch):
    mixture = f"{source}:0.75,demo:train:0.25"
    kept = load_instructions(mixture, tokenizer=tokenizer, seed=5)
    monkeypatch.setattr(spool, "MEMORY_BYTES", 4096)
    stored = load_instructions(mixture, tokenizer=tokenizer, seed=5)
    assert isinstance(kept, list) and not isinstance(stored, list)
    assert list(stored) == kept
    assert mix(["aaa", "b"], [1, 1], exhausted="repeat", seed=1).count("b") == 3


CHILD = """
import sys
from loram_cli.runs.meter import Meter
from loram_cli.training.data import spool
from loram_cli.training.data.documents import load_instructions
import torch, transformers, datasets, loram_cli.training.data.tokens
spool.MEMORY_BYTES = int(sys.argv[2])
# Not ru_maxrss, which a child inherits from the process that starts it.
meter = Meter()
found = load_instructions(sys.argv[1])
print(len(found), meter.stop().peak_memory_increase_bytes)
"""


@pytest.mark.slow
def test_a_data_set_of_150_mib_takes_a_few_in_memory(tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(30_000):
            file.write(json.dumps({"prompt": f"{i} ", "completion": "word " * 1000}) + "\n")
    taken = []
    for memory in (1 << 40, 8 << 20):
        command = [sys.executable, "-c", CHILD, str(path), str(memory)]
        count, size = map(int, subprocess.check_output(command, text=True).split())
        assert count == 30_000
        taken.append(size / 2**20)
    assert taken[0] > 140
    assert taken[1] < 40
