"""No test sees the working directory, the home directory or the settings of who starts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.isolation import isolated

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = {
    "LORAM_RUN": "/nonexistent/run", "LORAM_TRAIN_STEP": "3", "LORAM_PRUNE_RATIO": "a lot",
    "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1",
}  # fmt: skip


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """Holds a run directory and settings that fail whatever reads them, and is the home as well."""
    folder = tmp_path / "hostile"
    (folder / "loram-run").mkdir(parents=True)
    (folder / "loram-run" / "run.json").write_text("{ broken")
    (folder / "loram.yaml").write_text("train: [\n")
    return folder


def pytest_there(folder: Path, *words: object) -> str:
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    done = subprocess.run(
        [*map(str, command), "-p", "no:cacheprovider", *map(str, words)],
        cwd=folder, env={**os.environ, **HOSTILE, "HOME": str(folder)}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def listing(folder: Path) -> set[str]:
    """Files of a folder, without hypothesis's own."""
    return {path.name for path in folder.rglob("*") if ".hypothesis" not in path.parts}


def test_a_test_starts_in_an_empty_folder_without_settings():
    assert list(Path.cwd().iterdir()) == []
    assert list(Path.home().rglob("loram*")) == []
    assert Path.home() != ROOT.parent
    assert Path(os.environ["HF_HOME"]).is_relative_to(Path.home())
    assert not set(HOSTILE) & set(os.environ)


def test_only_settings_are_taken_from_the_environment(tmp_path: Path):
    before = {
        **HOSTILE,
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "HOME": "/root",
        "PYTHONPATH": "/x",
    }
    after = isolated(before, tmp_path, ROOT)
    assert not set(HOSTILE) & set(after)
    assert (after["PATH"], after["OMP_NUM_THREADS"]) == ("/bin", "1")
    assert after["HOME"] == str(tmp_path)
    assert after["PYTHONPATH"] == f"{ROOT}{os.pathsep}/x"


@pytest.mark.integration
def test_the_default_tests_are_collected_beside_a_run_and_settings(hostile_folder: Path):
    before = listing(hostile_folder)
    out = pytest_there(hostile_folder, ROOT / "tests", "--collect-only", "-q")
    counts = {Path(f).name: int(n) for f, n in re.findall(r"^(\S+\.py): (\d+)$", out, re.MULTILINE)}
    assert {"test_memory.py", "test_chain.py", "test_settings.py"} <= set(counts)
    assert "test_wheel.py" not in counts
    assert listing(hostile_folder) == before


@pytest.mark.slow
@pytest.mark.integration
def test_tests_pass_beside_a_run_and_settings(hostile_folder: Path):
    """``test_memory`` once found ./loram-run, and gave the report of that."""
    before = listing(hostile_folder)
    places = ("cli/draw/test_memory.py", "test_isolation.py")
    words = [ROOT / "tests" / place for place in places]
    out = pytest_there(hostile_folder, *words, "-m", "not slow and not integration")
    assert re.search(r"\d+ passed|100%", out)
    assert listing(hostile_folder) == before
