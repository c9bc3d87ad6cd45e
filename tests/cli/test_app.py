"""What the command sets up before anything is run."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from loram_cli.cli.app import bound_spinning
assert "torch" not in sys.modules
bound_spinning()
import os
print(*(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")))
"""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "10000 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
    ],
)
def test_spinning_is_bounded_before_torch_is_loaded_unless_the_user_says_otherwise(given, told):
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == told
