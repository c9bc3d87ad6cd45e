"""Commands on several processes: how to start them, and what they left."""

import csv
import time
from pathlib import Path

import pytest


def finished(process):
    """What a command said once it has ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def errors(err):
    return [line for line in err.splitlines() if line.startswith("error:")]


def curve(directory):
    with (directory / "loss.csv").open() as file:
        return [(r["step"], r["split"], float(r["loss"])) for r in csv.DictReader(file)]


def same_curve(one, two):
    assert [row[:2] for row in two] == [row[:2] for row in one]
    assert [row[2] for row in two] == pytest.approx([row[2] for row in one], abs=2e-5)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_checkpoint(folder: Path, process):
    """Until a checkpoint is whole."""
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/checkpoint-*/whole")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
