"""Versions and shell completion."""

import os
import subprocess
import sys

import pytest

from loram_cli.cli.app import run_command


def test_version_is_one_name_and_version_a_line(capsys):
    assert run_command(["--version"]) == 0
    lines = [line.split(" ") for line in capsys.readouterr().out.splitlines()]
    assert all(len(words) == 2 for words in lines)
    versions = dict(lines)
    assert {"loram", "python", "torch", "transformers", "peft"} <= set(versions)
    assert versions["python"].startswith("3.")


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
