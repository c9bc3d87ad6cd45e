"""Models and data that many tests share."""

import json
import shutil
from pathlib import Path

import hypothesis
import pytest
from tiny import make_base

# A test's time says how busy the machine is, not whether the code is right; and every run tries
# the same examples.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
