"""The wheel, in an environment of its own, and on every Python that is supported.

Interpreters are looked for as ``python3.12`` and so on, among pyenv's (``PYENV_ROOT``), and in
``TEST_PYTHONS``: paths of executables, separated by colons.
"""

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


def start(*words: object, **options) -> subprocess.CompletedProcess:
    # pip takes what lies on the path for installed.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, env=environment, **options
    )


def run(*words: object, **options) -> str:
    done = start(*words, **options)
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
    assert {"loram_cli/tools/page.html", "loram_cli/docs/tutorial.md"} <= names
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


def python_of(version: str) -> str:
    """An interpreter of a version that can make an environment, or a skip."""
    candidates = [
        *os.environ.get("TEST_PYTHONS", "").split(os.pathsep),
        shutil.which(f"python{version}"),
    ]
    if "PYENV_ROOT" in os.environ:
        installed = Path(os.environ["PYENV_ROOT"], "versions").glob(f"{version}.*/bin/python")
        candidates += sorted(map(str, installed), reverse=True)
    probe = "import ensurepip, ssl, sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        # pyenv's own python3.12 is a script that fails unless that version is chosen.
        try:
            done = subprocess.run([candidate, "-c", probe], capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    pytest.skip(f"python {version} is not installed here; TEST_PYTHONS may name it")


@pytest.mark.parametrize("version", PYTHONS)
def test_every_supported_python_compiles_and_starts_it(wheel: Path, version: str, tmp_path: Path):
    """Syntax of all files, and the import of what needs the standard library alone."""
    python = python_of(version)
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    run(python, "-W", "error", "-m", "compileall", "-q", tmp_path / "unpacked")
    light = "loram_cli.errors, loram_cli.schema, loram_cli.units, loram_cli.runs.manifest"
    light += ", loram_cli.runs.staging, loram_cli.arch.registry, loram_cli.pruning.plan"
    run(python, "-W", "error", "-c", f"import {light}", cwd=tmp_path / "unpacked")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", PYTHONS)
def test_it_installs_from_an_index_and_works_on_every_supported_python(
    wheel: Path, version: str, tmp_path: Path
):
    """With all its libraries, as a user would: minutes, and 2 to 6 GB of disk as torch comes with CUDA or without."""
    own = ".".join(map(str, sys.version_info[:2]))
    if version == own:
        pytest.skip(f"python {own} runs these tests, with the same libraries")
    run(python_of(version), "-m", "venv", tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    pip = [binaries / "python", "-m", "pip", "install", "--quiet"]
    pip += ["--constraint", ROOT / "constraints.txt"]
    try:
        # By itself first: it decides which of the others' builds fit.
        for what in ("torch", wheel):
            done = start(*pip, what)
            if any(text in done.stderr for text in ("ConnectionError", "Connection refused",
                                                    "Name or service not known")):  # fmt: skip
                pytest.skip("no package index can be reached")
            assert done.returncode == 0, done.stderr
        loram = binaries / "loram"
        said = run(loram, "--version", cwd=tmp_path)
        assert "loram 0." in said and f"python {version}." in said
        assert "memory-report" in run(loram, "--help", cwd=tmp_path)
        run(loram, "prune", "--strategy", "rand", "--ratio", "0.85", cwd=tmp_path)
        few = ["--steps", "2", "--batch", "2", "--micro-batch", "2", "--eval-examples", "4"]
        run(loram, "train", *few, cwd=tmp_path)
        run(loram, "recover", "--merge", cwd=tmp_path)
        for made in ("pruned", "adapter", "recovered", "merged"):
            run(loram, "verify", f"loram-run/{made}", cwd=tmp_path)
        assert "made by 'recover'" in run(loram, "inspect", "loram-run/recovered", cwd=tmp_path)
    finally:
        shutil.rmtree(tmp_path / "venv")


# pipx hands pip's settings on; uv reads none of them, and is told where wheels lie.
TOOLS = {
    "pipx": ("install", "--pip-args", f"--constraint {ROOT / 'constraints.txt'}"),
    "uv": ("tool", "install", "--constraints", str(ROOT / "constraints.txt")),
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_installs_it_from_the_wheel(wheel: Path, name: str, tmp_path: Path, monkeypatch):
    """In an environment of its own, with nothing of ours on any path: 1 to 6 GB of disk."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed here")
    for variable in ("PIPX_HOME", "PIPX_BIN_DIR", "PIPX_MAN_DIR", "UV_TOOL_DIR", "UV_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("UV_TOOL_BIN_DIR", str(tmp_path / "pipx_bin_dir"))
    monkeypatch.setenv("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", ""))
    python = getattr(sys, "_base_executable", sys.executable)
    done = start(program, *TOOLS[name], "--python", python, wheel)
    if "Name or service not known" in done.stderr or "dns error" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        loram = tmp_path / "pipx_bin_dir" / "loram"
        assert "loram 0." in run(loram, "--version", cwd=tmp_path)
        run(loram, "prune", "--strategy", "rand", "--ratio", "0.85", cwd=tmp_path)
        run(loram, "verify", "loram-run", cwd=tmp_path)
        run(loram, "report", cwd=tmp_path)
        page = (tmp_path / "loram-run" / "report.html").read_text()
        assert "Widths of the pruned model" in page
    finally:
        for folder in ("pipx_home", "uv_tool_dir", "uv_cache_dir"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
