"""A model shared out among two gloo processes, beside the same one whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from helpers.variants import VARIANTS

SCRIPT = Path(helpers.__file__).with_name("sharding_check.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def check_shared(directories):
    # The script imports helpers as well.
    search = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *LAUNCHER, SCRIPT, *directories],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    # LoRA, LoRA on NF4, and all parameters.
    assert len(told) == 3 * len(directories)
    assert {name: worst for name, (worst, _) in told.items() if worst > 1e-5} == {}
    assert {name: share for name, (_, share) in told.items() if abs(share - 0.5) > 0.02} == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_pruned_model_gives_the_same_loss_and_gradients_when_shared_out(finished_run):
    check_shared([finished_run / "pruned"])


# Some at a time, since each time two processes import torch.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, len(VARIANTS), 8))
def test_every_family_gives_the_same_loss_and_gradients_when_shared_out(first, tmp_path):
    some = VARIANTS[first : first + 8]
    check_shared([variant.save(tmp_path / variant.name) for variant in some])
