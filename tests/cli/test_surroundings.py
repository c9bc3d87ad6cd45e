"""What a command is started in: streams, encodings, directories, limits."""

import importlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.slow import slow

from loram_cli.cli.app import run_command
from loram_cli.cli.commands.table import COMMANDS, load

pytestmark = pytest.mark.integration
REPORT = ("memory-report", "--preset", "llama2-7b")
LONG = "a" * 300


def started(*words: str, shell: str = "", **options) -> subprocess.CompletedProcess:
    line = f'"$0" -m loram_cli "$@" {shell}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, *words], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("words", [("--version",), ("inspect", "."), ("prune", "--dry-run")])
def test_a_working_directory_that_is_gone(words, tmp_path: Path):
    (tmp_path / "gone").mkdir()
    code = f"import os, sys; os.chdir('gone'); os.rmdir('../gone'); os.execv(sys.executable, [sys.executable, '-m', 'loram_cli', *{words!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.splitlines()) == (
        1, ["error: the working directory is gone", "change to another one"]
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", LONG), ("verify", LONG), ("prune", "--model", LONG),
        ("prune", "--model", f"./{LONG}"), ("prune", "--run", LONG, "--dry-run"),
        ("prune", "--out", LONG), ("run", LONG), ("generate", "x", "--row", f"a={LONG}"),
        ("report", "--run", LONG), ("eval", "--task-data", f"gsm8k={LONG}"),
        ("memory-report", "--model", LONG), ("train", "--in", LONG, "--data", LONG),
    ],
    ids=lambda words: " ".join(words)[:24],
)  # fmt: skip
def test_a_name_that_no_file_can_have(words, capsys):
    assert run_command([*words]) in (1, 2)
    err = capsys.readouterr().err
    assert "internal" not in err
    assert LONG in err


@pytest.mark.parametrize("shell", [">&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_closed_streams(shell):
    done = started(*REPORT, shell=shell)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "internal" not in done.stderr


def test_no_file_gets_what_is_printed_to_a_closed_stream(tmp_path: Path):
    out = tmp_path / "report.png"
    done = started(*REPORT, "--plot", str(out), shell=">&-")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_full_device_is_told():
    for words in (REPORT, ("--help",)):
        done = started(*words, shell=">/dev/full")
        assert done.returncode == 1
        assert "no space left on the disk" in done.stderr


def test_a_reader_that_ends_early():
    done = started(*REPORT, shell="| true")
    assert "Traceback" not in done.stderr
    assert "internal" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", slow("latin-1"), slow("cp437")])
@pytest.mark.parametrize("words", [REPORT, ("--help",), ("prune", "--dry-run")])
def test_any_encoding(words, encoding, tmp_path: Path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LORAM_RUN": str(tmp_path / "run")}
    line = [sys.executable, "-m", "loram_cli", *words]
    done = subprocess.run(line, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_half_characters(capsys):
    assert run_command(["inspect", "./\udcff"]) == 1
    assert r"\udcff: no such directory" in capsys.readouterr().err
    done = started("generate", "\udcff", "--rows", "nobody")
    assert done.returncode == 2
    assert "internal" not in done.stderr


def test_too_little_memory(tmp_path: Path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))

    words = ("prune", "--strategy", "rand", "--run", str(tmp_path / "run"))
    done = started(*words, preexec_fn=limited)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
    assert "internal" not in done.stderr


@pytest.mark.parametrize("name", ["loram.yaml", "recipe.yaml"])
def test_settings_and_recipes_that_are_no_files(name, capsys):
    os.mkfifo(name)
    assert run_command(["run", "recipe.yaml"] if name[0] == "r" else ["prune"]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_settings_that_expand_or_nest(capsys):
    Path("loram.yaml").write_text("prune: &p {ratio: *p}\n")
    assert run_command(["prune"]) == 2
    assert "aliases expand past" in capsys.readouterr().err
    Path("loram.yaml").unlink()
    Path("pyproject.toml").write_text("a = " + "[" * 10_000)
    assert run_command(["prune", "--dry-run"]) == 0


@pytest.mark.parametrize(
    "source",
    [
        "int(os.environ['FAULTY_TIMEOUT'])",
        "def check(): raise KeyError('FAULTY_TIMEOUT must be a number')\ncheck()",
    ],
)
def test_a_variable_that_a_library_cannot_read_is_named(source, tmp_path, monkeypatch, capsys):
    (tmp_path / "faulty_library.py").write_text(f"import os\n{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAULTY_TIMEOUT", "1 hour")
    words = ["inspect", "."]
    with monkeypatch.context() as patch:
        found = "loram_cli.cli.app._check_surroundings"
        patch.setattr(found, lambda _: importlib.import_module("faulty_library"))
        assert run_command(words) == 2
    told = capsys.readouterr().err
    assert "the environment variable FAULTY_TIMEOUT: a library cannot use its value" in told
    assert "correct it, or unset FAULTY_TIMEOUT" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", "9" * 400), "--seed is larger than 2^63"),
        (("--ratio", "9" * 400), "--ratio inf is not a finite number"),
        (("--ratio", "1e-300"), "--ratio 1e-300 is too small to be told from 0"),
        (("--multiple-of", str(2**40)), "--multiple-of is larger than 2^31"),
        (("--device", "cuda:x"), "--device cuda:x: unknown"),
        (("--device", "a\nb"), "--device 'a\\nb': unknown"),
        (("--target-params", "1e999999999"), "not a count of parameters"),
        (("--fit-memory", "9" * 400), "not an amount of memory"),
    ],
)
def test_numbers_beyond_all_measure(words, message, capsys):
    assert run_command(["prune", "--strategy", "rand", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_the_list_of_commands_says_is_each_command_s_own_first_line():
    for name, (_, summary) in COMMANDS.items():
        module = load(name)
        assert name == module.NAME
        assert module.command.__doc__.splitlines()[0] == summary


def test_a_command_loads_no_other():
    code = (
        "import sys; from loram_cli.cli.app import run_command\n"
        "assert run_command(['inspect', '--help']) == 0\n"
        "loaded = {n for n in sys.modules if n.startswith('loram_cli.cli.commands.')}\n"
        "assert loaded == {'loram_cli.cli.commands.table', 'loram_cli.cli.commands.inspect'}, loaded\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert run_command(["--help"]) == 0


def test_a_wrong_command_is_told_its_neighbour(capsys):
    assert run_command(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
