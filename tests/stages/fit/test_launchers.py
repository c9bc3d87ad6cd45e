"""What real launchers do to a training on two gloo processes, and what it makes of that."""

import os
import signal
import time
from pathlib import Path

import pytest
from helpers.processes import children, curve, errors, finished, same_curve, wait_for_checkpoint

from loram_cli.runs.manifest import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ACCELERATE = ("-m", "accelerate.commands.launch")
# As `accelerate config` writes it.
CONFIG = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: {kind}
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
main_process_port: 0
mixed_precision: fp16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
FSDP_CONFIG = """
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_version: 2
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids):
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("kind", "way"), [("MULTI_GPU", "train"), ("FSDP", "train nf4")])
def test_accelerate_launch_does_what_its_config_file_says(launch, tmp_path, kind, way):
    finished(launch(way, "one", "one"))
    file = tmp_path / "accelerate.yaml"
    file.write_text(CONFIG.format(kind=kind) + (FSDP_CONFIG if kind == "FSDP" else ""))
    launcher = (*ACCELERATE, "--config_file", str(file))
    out, err = finished(launch(way, "ddp", "two", "--json", launcher=launcher))
    assert len(out.strip().splitlines()) == 1
    same_curve(curve(tmp_path / "one"), curve(tmp_path / "two"))
    assert Manifest.read(tmp_path / "two").spec["fsdp"] == (kind == "FSDP")
    # It would have scaled the loss by what fp16 wants.
    assert err.count("mixed precision fp16 is ignored") == 1
    assert err.count("fsdp_activation_checkpointing is ignored") == (kind == "FSDP")


def test_accelerate_launch_says_that_it_starts_one_process_on_a_cpu(launch, tmp_path):
    launcher = (*ACCELERATE, "--cpu", "--num_processes", "2")
    _, err = finished(launch("align", "ddp", "one", steps=1, launcher=launcher))
    assert err.count("this is the only process") == 1


def test_torchrun_takes_a_run_behind_two_dashes(launch, runs, tmp_path):
    program = ("-m", "--", "loram_cli")
    more = ("--run", str(runs / "narrow"))
    finished(launch("align", "ddp", "two", *more, steps=1, program=program))


@pytest.mark.parametrize(
    ("way", "kind", "before", "after"),
    [
        ("train", "ddp", 2, 1),
        ("train", "ddp", 1, 2),
        ("train dpo", "ddp", 2, 1),
        ("train nf4", "fsdp", 2, 4),
        ("align", "fsdp", 4, 2),
    ],
)
def test_a_killed_training_goes_on_with_more_or_fewer_processes(
    launch, tmp_path, way, kind, before, after
):
    def started(processes, out):
        how = "one" if processes == 1 else kind
        # A batch that divides among four.
        more = ("--micro-batch", "1")
        return launch(way, how, out, *more, steps=12, processes=processes)

    finished(started(1, "one"))
    process = started(before, "two")
    wait_for_checkpoint(tmp_path / ".two.partial", process)
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    _, err = finished(started(after, "two"))
    assert err.count("resuming at step") == 1
    same_curve(curve(tmp_path / "one"), curve(tmp_path / "two"))
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_of_slices_are_of_no_use_to_whole_models(launch, tmp_path):
    process = launch("train", "fsdp", "out", steps=40)
    wait_for_checkpoint(tmp_path / ".out.partial", process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    _, err = finished(launch("train", "one", "out", steps=40))
    assert "resuming" not in err
    assert "were written with --fsdp, and this runs without: starting over" in err


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_end_with_a_launcher_that_is_killed(launch, tmp_path, kind):
    process = launch("train", kind, "out", steps=400)
    wait_for_checkpoint(tmp_path / ".out.partial", process)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    wait_for_end(workers)
    _, err = process.communicate(timeout=60)
    assert len(errors(err)) == 1
    assert "interrupted" in errors(err)[0]
    step = int(err.partition("stopped at step ")[2].partition(" of ")[0])
    assert (tmp_path / ".out.partial" / "checkpoints" / f"checkpoint-{step}" / "whole").is_file()


def test_sigterm_to_the_launcher_ends_all(launch, tmp_path):
    process = launch("train", "ddp", "out", steps=400)
    wait_for_checkpoint(tmp_path / ".out.partial", process)
    workers = children(process.pid)
    process.terminate()
    _, err = process.communicate(timeout=60)
    wait_for_end(workers)
    assert process.returncode != 0
    assert "internal:" not in err
    assert len(errors(err)) <= 1


def test_the_launcher_repeats_the_reason_at_the_end(launch, tmp_path):
    process = launch("train", "ddp", "out", processes=3)
    _, err = process.communicate(timeout=60)
    assert len(errors(err)) == 1
    assert "--batch 8 does not divide" in err.partition("Root Cause")[2]


def test_two_launches_do_not_write_one_output(launch, tmp_path):
    first = launch("train", "ddp", "out", steps=400)
    wait_for_checkpoint(tmp_path / ".out.partial", first)
    _, err = launch("train", "ddp", "out", steps=400).communicate(timeout=120)
    assert len(errors(err)) == 1
    assert "in use by another loram command" in errors(err)[0]
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
