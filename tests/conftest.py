"""Models and data that many tests share."""

import contextlib
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from helpers.isolation import is_ours, isolated
from helpers.tiny_models import make_base

ROOT = Path(__file__).resolve().parents[1]

STARTED = pytest.StashKey[float]()
FROZEN = pytest.StashKey[int]()
# A test that is begun at the last moment may take so long.
LONGEST_SECONDS = 1200

# Tests that get a finished run, and tests of stages and of faults that get a model, run commands:
# they are marked here, others by their file or themselves.
INTEGRATION_FOLDERS = ("faults", "stages")
MODEL_FIXTURES = frozenset({"base", "shared", "shared_file"})

# A test's time says how busy the machine is, not whether the code is right; and every run tries
# the same examples.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

SHARED = ROOT.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-minutes", type=float, help="Start no slow test after so many minutes.")
    parser.addoption("--slow-order", type=int, help="Seed of the order in which files come then.")


def pytest_configure(config: pytest.Config) -> None:
    # Another order every day, so that in time every test is among those that time allows. Workers
    # are given these options as they are after this.
    if config.option.slow_order is None:
        config.option.slow_order = int(time.time() // 86400)
    config.stash[STARTED] = time.monotonic()
    # Here, since libraries read some of these variables when test files import them.
    home = tempfile.TemporaryDirectory(prefix="loram-tests-home-")
    config.add_cleanup(home.cleanup)
    environment = isolated(os.environ, Path(home.name), ROOT)
    os.environ.clear()
    os.environ.update(environment)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.option.slow_minutes is not None:
        terminalreporter.write_line(
            f"slow tests begun in {config.option.slow_minutes:g} minutes, "
            f"--slow-order {config.option.slow_order}"
        )


def runs_commands(item: pytest.Item) -> bool:
    """Whether a test's place and its fixtures tell that it runs stages."""
    fixtures = set(getattr(item, "fixturenames", ()))
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    on_a_model = folder in INTEGRATION_FOLDERS and not MODEL_FIXTURES.isdisjoint(fixtures)
    return "finished_run" in fixtures or on_a_model


# First: the marks decide what -m keeps.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in filter(runs_commands, items):
        item.add_marker(pytest.mark.integration)
    if config.option.slow_minutes is None:
        return
    files = sorted({item.path for item in items})
    random.Random(config.option.slow_order).shuffle(files)
    items.sort(key=lambda item: files.index(item.path))


def leave_libraries_out_of_collections(config: pytest.Config) -> None:
    """Once libraries were imported, keep the garbage collector from looking through them again.

    Every stage collects garbage before it measures memory: half a second where torch, transformers
    and trl are loaded, and two thirds of the time of a test that runs stages on a tiny model.
    """
    loaded = len(sys.modules)
    if loaded > config.stash.get(FROZEN, 0) + 50:
        gc.collect()
        gc.freeze()
        config.stash[FROZEN] = loaded


def pytest_runtest_setup(item: pytest.Item) -> None:
    leave_libraries_out_of_collections(item.config)
    minutes = item.config.option.slow_minutes
    if minutes is None or item.get_closest_marker("slow") is None:
        return
    own = item.get_closest_marker("timeout")
    if own is not None and own.args[0] > LONGEST_SECONDS:
        pytest.skip("may take longer than there is time for slow tests (--slow-minutes)")
    if time.monotonic() - item.config.stash[STARTED] > minutes * 60:
        pytest.skip("the time for slow tests is up (--slow-minutes)")


@pytest.fixture(scope="session", autouse=True)
def shared_working_directory() -> Iterator[None]:
    """An empty working directory for the fixtures that many tests share."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


@pytest.fixture(autouse=True)
def working_directory(shared_working_directory: None) -> Iterator[None]:
    """An empty working directory for every test, and no setting that an earlier one left."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
    ):
        for name in filter(is_ours, list(os.environ)):
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real weights and data is absent")
    return SHARED


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"Line {i}: the quick brown fox jumps over {i * 7} lazy dogs." for i in range(120)]
    file.write_text("\n\n".join(lines))
    return file


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("instructions") / "train.jsonl"
    rows = [{"question": f"What is {i} plus 1?", "answer": f"#### {i + 1}"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def finished_run(base, text_file, instructions, tmp_path_factory) -> Path:
    """A run directory with every stage's output, made by the commands. Copy before changing it."""
    from loram_cli.cli.app import run_command

    run = tmp_path_factory.mktemp("finished") / "run"
    keep = ["--keep-first", "1", "--keep-last", "1", "--ratio", "0.5", "--strategy", "rand"]
    fit = ["--steps", "2", "--batch", "4", "--micro-batch", "2"]
    perplexity = ["--tasks", "perplexity", "--task-data", f"perplexity={instructions}"]
    for words in (
        ["prune", "--model", base, *keep],
        ["align", "--data", text_file, *fit, "--block-length", "32"],
        ["train", "--data", instructions, *fit, "--max-length", "64", "--learning-rate", "1e-2"],
        ["recover", "--merge"],
        ["eval", *perplexity, "--limit", "4"],
    ):
        assert run_command([*map(str, words), "--run", str(run)]) == 0
    return run


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """The finished run, to change at will."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def shared_file():
    def find(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"reference input {name} is not beside the checkout")
        return path

    return find
