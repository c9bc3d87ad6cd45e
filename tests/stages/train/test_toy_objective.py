"""An objective is one file and one line in the table: the example of contributing.md."""

import json
from dataclasses import replace
from functools import partial

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import UsageError
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.train.objectives import sft
from loram_cli.stages.train.objectives.table import OBJECTIVES
from loram_cli.training.data.documents import load_instructions


def load(spec, tokenizer, reporter):
    """Each prompt is its own answer."""

    def echo(source, limit=None):
        read = partial(load_instructions, tokenizer=tokenizer, reporter=reporter, limit=limit)
        return [replace(e, completion=f" {e.prompt}", given=()) for e in read(source)]

    return echo


def check(spec):
    if spec.max_length < 8:
        raise UsageError("--objective echo needs a --max-length of at least 8")


TOY = replace(
    sft.OBJECTIVE,
    title="Training to repeat",
    learns_from="prompts",
    settings=lambda spec: {"dropout": 0.0, "beta": 0.5},
    load=load,
    check=check,
)


@pytest.fixture
def words(run_copy, instructions):
    given = ["--data", instructions, "--steps", "2", "--batch", "4", "--max-length", "64"]
    return lambda *more: [
        *map(str, ["train", "--objective", "echo", "--run", run_copy, *given, "--force", *more])
    ]


def test_a_toy_objective_runs(monkeypatch, words, run_copy, capsys):
    assert run_command(words()) == 2
    assert "unknown value 'echo'" in capsys.readouterr().err
    monkeypatch.setitem(OBJECTIVES, "echo", TOY)
    assert run_command(words("--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert plan["figures"]["examples"] == 54
    assert run_command(words("--max-length", "7")) == 2
    assert "at least 8" in capsys.readouterr().err
    assert run_command(words("--generations", "2")) == 2
    assert "--generations does not go with --objective echo" in capsys.readouterr().err
    assert run_command(words("--out", str(run_copy / "echo"))) == 0
    manifest = Manifest.read(run_copy / "echo")
    assert manifest.results["objective"] == "echo"
    assert manifest.spec["beta"] == 0.5
    assert manifest.results["lora_params"] > 0
