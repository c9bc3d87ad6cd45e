"""One training on two gloo processes on a CPU: the same as on one, whatever happens on the way."""

import json
import os
import signal
from pathlib import Path

import helpers
import pytest
from helpers.processes import children, curve, errors, finished, same_curve, wait_for_checkpoint

from loram_cli.runs.manifest import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WAYS = ("train", "train nf4", "train dpo", "align", "align sparse")


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_does(launch, tmp_path, way):
    kinds = {"align sparse": ("one", "fsdp"), "train dpo": ("one", "ddp")}.get(
        way, ("one", "ddp", "fsdp")
    )
    for kind in kinds:
        # With preferences, no farther than the end of an epoch, where pairs fill up the last round.
        steps = 6 if way == "train dpo" else 9
        out, _ = finished(launch(way, kind, kind, "--json", steps=steps))
        # One object on stdout, not one per process.
        assert json.loads(out)["fresh"]
        assert len(out.strip().splitlines()) == 1
    one = curve(tmp_path / "one")
    assert one[-1][2] < one[0][2]
    manifests = [Manifest.read(tmp_path / kind) for kind in kinds]
    for kind, manifest in zip(kinds, manifests, strict=True):
        same_curve(one, curve(tmp_path / kind))
        assert sorted(manifest.outputs) == sorted(manifests[0].outputs)
        assert manifest.key == manifests[0].key
        assert manifest.results.get("zeros") == manifests[0].results.get("zeros")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", ["train", "align"])
def test_a_killed_training_goes_on(launch, tmp_path, way, kind):
    finished(launch(way, "one", "one", steps=16))
    process = launch(way, kind, "two", steps=16)
    wait_for_checkpoint(tmp_path / ".two.partial", process)
    # Each process leads a session of its own.
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "two").exists()
    _, err = finished(launch(way, kind, "two", steps=16))
    assert err.count("resuming at step") == 1
    same_curve(curve(tmp_path / "one"), curve(tmp_path / "two"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ctrl_c_stops_every_process_at_the_same_step(launch, tmp_path, kind):
    process = launch("train", kind, "out", steps=400)
    wait_for_checkpoint(tmp_path / ".out.partial", process)
    # The launcher hands it on.
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    # The launcher's own.
    assert err.count("Traceback") == 1
    assert err.count("stopped at step") == 1
    assert len(errors(err)) == 1
    assert "interrupted" in errors(err)[0]
    step = int(err.partition("stopped at step ")[2].partition(" of ")[0])
    assert (tmp_path / ".out.partial" / "checkpoints" / f"checkpoint-{step}" / "whole").is_file()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("fault", ["1 step", "1 data", "0 step", "1 killed"])
def test_what_fails_on_one_process_ends_all_with_one_line(launch, tmp_path, kind, fault):
    program = (Path(helpers.__file__).with_name("faulty_rank.py"),)
    process = launch("train", kind, "out", program=program, env={"FAULT": fault}.items())
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "internal:" not in err
    said = errors(err)
    if fault.endswith("killed"):
        assert len(said) <= 1
    else:
        assert len(said) == 1
        assert ("nan at step 2" in said[0]) or ("after line 3" in said[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_is_told_once(launch, kind):
    process = launch("align", kind, "out", "--learning-rate", "1e18", "--warmup-steps", "0")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(errors(err)) == 1
    assert "is nan at step" in errors(err)[0] or "is inf at step" in errors(err)[0]
