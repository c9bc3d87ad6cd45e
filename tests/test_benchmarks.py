"""The scripts of ``make bench*`` start from any folder; nothing collects them as tests."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).with_name("benchmarks")
# A folder with a __main__.py is started as a script is.
SCRIPTS = sorted(
    [file for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text()]
    + [file.parent for file in BENCHMARKS.glob("*/__main__.py")]
)
# One process for all of them, since each would import torch anew.
HELP = """
import runpy, sys
folder, *scripts = sys.argv[1:]
sys.path[0] = folder
for script in scripts:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    else:
        raise AssertionError(f"{script} ran instead of helping")
"""


@pytest.mark.integration
def test_every_script_has_a_help():
    words = [sys.executable, "-W", "ignore", "-c", HELP, str(BENCHMARKS), *map(str, SCRIPTS)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS) >= 10


def test_make_benches_name_scripts_that_exist():
    makefile = (BENCHMARKS.parents[1] / "Makefile").read_text()
    named = {word.split("/")[-1] for word in makefile.split() if word.startswith("$(BENCHMARKS)/")}
    assert named
    assert named <= {script.name for script in SCRIPTS}
