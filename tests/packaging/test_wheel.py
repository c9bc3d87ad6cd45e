"""The wheel, in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import loram_cli

ROOT = Path(loram_cli.__file__).parents[1]
MAX_WHEEL_BYTES = 8 * 10**6
PYTHONS = ("3.11", "3.12", "3.13")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*words: object, **options) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, env=environment, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left beside the sources."""
    source = tmp_path_factory.mktemp("source")
    names = ("loram_cli", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignore)
        else:
            shutil.copyfile(path, source / name)
    out = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, source]
    # Without an index the build back end must be at hand already.
    try:
        import setuptools

        version = tuple(map(int, setuptools.__version__.split(".")[:1]))
    except ImportError:
        version = (0,)
    if version >= (77,):
        words.insert(5, "--no-build-isolation")
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("the build back end is neither installed nor to be had from an index")
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_is_small_and_holds_the_data_files(wheel: Path):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "loram_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {"loram_cli/stages/page.html", "loram_cli/docs/tutorial.md"} <= names
    assert set(tracked) <= names, sorted(set(tracked) - names)
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path):
    """Ours from the wheel; the libraries, which are not ours to test, through a path file."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (Path(purelib) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import loram_cli; print(loram_cli.__file__)", cwd=tmp_path)
    assert where.strip().startswith(purelib)
    loram = tmp_path / "venv" / "bin" / "loram"
    assert "loram 0." in run(loram, "--version", cwd=tmp_path)
    keep = ["--strategy", "rand", "--ratio", "0.85"]
    run(loram, "prune", *keep, cwd=tmp_path)
    run(loram, "verify", "loram-run/pruned", cwd=tmp_path)
    assert "made by 'prune'" in run(loram, "inspect", "loram-run/pruned", cwd=tmp_path)
    assert "dependencies are" not in run(python, "-m", "pip", "show", "loram")


@pytest.mark.parametrize("version", PYTHONS)
def test_every_supported_python_compiles_and_starts_it(wheel: Path, version: str, tmp_path: Path):
    """Syntax of all files, and the import of what needs the standard library alone."""
    python = shutil.which(f"python{version}")
    probe = [python or "", "-c", "import sys; print(sys.version_info[:2])"]
    if python is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"python {version} is not installed here")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    run(python, "-W", "error", "-m", "compileall", "-q", tmp_path / "unpacked")
    light = "loram_cli.errors, loram_cli.specs, loram_cli.units, loram_cli.runs.manifest"
    light += ", loram_cli.runs.staging, loram_cli.arch.registry, loram_cli.pruning.plan"
    run(python, "-W", "error", "-c", f"import {light}", cwd=tmp_path / "unpacked")
