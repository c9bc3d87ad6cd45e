"""One training on two gloo processes on a CPU: the same as on one, whatever happens on the way."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loram_cli.runs.manifest import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FIT = (
    "--batch", "8", "--micro-batch", "2", "--warmup-steps", "1", "--eval-steps", "2",
    "--save-steps", "2", "--device", "cpu",
)  # fmt: skip
WAYS = ("train", "train nf4", "train dpo", "align", "align sparse")


@pytest.fixture(scope="module")
def runs(base, text_file, tmp_path_factory):
    """Run directories with a narrow pruned model, and with one whose weights are zeroed."""
    from loram_cli.cli.app import run_command

    folder = tmp_path_factory.mktemp("runs")
    for name, words in {
        "narrow": ["--strategy", "rand", "--keep-first", "1", "--keep-last", "1"],
        "sparse": ["--strategy", "unst", "--calibration", text_file, "--calibration-samples", "20"],
    }.items():
        words = ["prune", "--model", base, "--ratio", "0.5", "--run", folder / name, *words]
        assert run_command([*map(str, words)]) == 0
    return folder


@pytest.fixture
def preferences(instructions, tmp_path):
    """Each answer, against the same one spelt backwards."""
    pairs = []
    for line in instructions.read_text().splitlines():
        prompt, answer = json.loads(line).values()
        pairs.append({"prompt": prompt, "chosen": answer, "rejected": answer[::-1]})
    file = tmp_path / "preferences.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


@pytest.fixture
def launch(runs, instructions, preferences, text_file, tmp_path):
    """Start a command; the way says which one, and the kind with how many processes."""

    def start(way, kind, out, *more, steps=4, program=("-m", "loram_cli"), env=()):
        command, _, what = way.partition(" ")
        run = runs / ("sparse" if what == "sparse" else "narrow")
        words = [command, "--in", run / "pruned", "--out", tmp_path / out, "--steps", steps, *FIT]
        if what == "dpo":
            words += ["--objective", "dpo", "--data", preferences, "--learning-rate", "3e-3"]
        elif command == "train":
            words += ["--data", instructions, "--dropout", "0", "--learning-rate", "3e-3"]
        else:
            words += ["--data", text_file, "--block-length", "32", "--learning-rate", "1e-3"]
            words += ["--method", "pretrain"]
        words += ["--quantize", "nf4"] if what == "nf4" else ["--gradient-checkpointing"]
        words += ["--fsdp"] if kind == "fsdp" else []
        start = () if kind == "one" else LAUNCHER
        return subprocess.Popen(
            [sys.executable, *start, *program, *map(str, (*words, *more))],
            env={
                **os.environ, "LORAM_RUN": str(run), "OMP_NUM_THREADS": "1", **dict(env)
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return start


def finished(process):
    """What a command said once it has ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def errors(err):
    return [line for line in err.splitlines() if line.startswith("error:")]


def curve(directory):
    with (directory / "loss.csv").open() as file:
        return [(r["step"], r["split"], float(r["loss"])) for r in csv.DictReader(file)]


def same_curve(one, two):
    assert [row[:2] for row in two] == [row[:2] for row in one]
    assert [row[2] for row in two] == pytest.approx([row[2] for row in one], abs=2e-5)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_checkpoint(folder: Path, process):
    """Until a checkpoint is whole."""
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/checkpoint-*/whole")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    assert err.count("going on from the checkpoint of step") == 1
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
    program = (Path(__file__).with_name("launched_with_faults.py"),)
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
    process = launch("align", kind, "out", "--learning-rate", "1e30", "--warmup-steps", "0")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(errors(err)) == 1
    assert "is nan at step" in errors(err)[0] or "is inf at step" in errors(err)[0]
