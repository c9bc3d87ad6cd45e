"""Versions and shell completion."""

import os
import subprocess
import sys

import pytest
import torch

from loram_cli.cli.app import run_command
from loram_cli.cli.options import BaseOptions, model_at_hand, settle
from loram_cli.reporting import NullReporter


def test_version_is_one_name_and_version_a_line(capsys):
    assert run_command(["--version"]) == 0
    lines = [line.split(" ") for line in capsys.readouterr().out.splitlines()]
    assert all(len(words) == 2 for words in lines)
    versions = dict(lines)
    assert {"loram", "python", "torch", "transformers", "peft"} <= set(versions)
    assert versions["python"].startswith("3.")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total"
        ),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError("Unable to allocate 2 GiB"),
        RuntimeError("can't start new thread"),
    ],
)
def test_too_little_memory_is_no_bug(error, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr("loram_cli.tools.memory_report.run", fails)
    assert run_command(["memory-report", "--preset", "llama2-7b"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: out of memory: {str(error).partition(chr(10))[0]}"
    assert "--micro-batch 1" in lines[1]
    assert len(lines) == 2


def test_version_imports_no_torch():
    code = (
        "import sys; from loram_cli.cli.app import run_command\n"
        "assert run_command(['--version']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def completed(line: str) -> list[str]:
    words = line.split(" ")
    environment = {
        **os.environ,
        "_LORAM_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "loram_cli"], env=environment, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("loram pru", {"prune"}),
        ("loram train --qu", {"--quantize"}),
        ("loram train --quantize ", {"nf4"}),
        ("loram prune --strategy r", {"rand"}),
    ],
)
def test_completion(line: str, words: set[str]):
    assert set(completed(line)) == words


def test_a_shell_gets_its_script():
    environment = {**os.environ, "_LORAM_COMPLETE": "source_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "loram_cli"], env=environment, capture_output=True, text=True
    )
    assert "complete -o default" in done.stdout


@pytest.mark.parametrize("remembered", [False, True])
def test_a_row_of_ones_own_is_its_own_base_in_a_run_that_is_about_none(remembered, tmp_path):
    run = tmp_path / "run"
    if remembered:
        run.mkdir()
        (run / "run.json").write_text('{"model": "demo"}')
    options = BaseOptions(run=run)
    rows = {"mine": (tmp_path / "model",), "other": (tmp_path / "other",)}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    place = settle(options, NullReporter(), at_hand=model_at_hand(options, rows))
    assert place.model == ("demo" if remembered else str(tmp_path / "model"))
