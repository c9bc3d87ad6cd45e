"""``make help`` is made from the Makefile itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    rules = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^make ([a-z-]+) +\S", done.stdout, re.MULTILINE)
    assert listed == rules
    assert {"test", "test-fast", "test-slow", "docs", "lint"} <= set(listed)
