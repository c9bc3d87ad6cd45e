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


def test_gain_kept_is_a_share_of_full_loras(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gain.report import merged, table

    common = {"bytes": 1.0, "predicted_peak_bytes": 2**30, "train_seconds": 60, "ppl_recovered": 20}
    full = {
        **common, "name": "full", "seed": 1, "loss_base": 1.5, "ppl_base": 18.0,
        "loss_before": 1.5, "loss_small": 0.9, "loss_recovered": 0.9, "loss_polished_10": 1.4,
    }  # fmt: skip
    small = {
        **common, "name": "stru-0.65-distill", "seed": 1, "bytes": 0.54, "align_tokens": 114688,
        "align_seconds": 300, "loss_before": 1.6, "loss_small": 1.2, "loss_recovered": 1.05,
    }  # fmt: skip
    stray = {**small, "seed": 7}
    rows = merged({"full@1": full, "small@1": small, "small@7": stray})
    assert [(row["name"], round(row["kept"], 6)) for row in rows] == [
        ("full", 1.0), ("stru-0.65-distill", 0.75),
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert [line.count("|") for line in lines] == [13] * 5
    assert "| 0.75 |" in lines[-1] and "| 115k |" in lines[-1]
    # Ten exact steps alone keep a sixth.
    assert lines[-2].endswith("| 0.17 |")
