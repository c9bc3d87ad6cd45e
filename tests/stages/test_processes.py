"""One training on several processes: the launcher's environment, and two gloo processes on a CPU."""

import csv
import json
import os
import subprocess
import sys

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import UsageError
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.processes import is_main_process, local_device, process_count, process_rank
from loram_cli.stages.fitting import fit_device
from loram_cli.stages.train import TrainSpec


@pytest.fixture
def launched(monkeypatch):
    def launch(rank, count=2):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return launch


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert (process_count(), process_rank(), is_main_process()) == (1, 0, True)
    assert local_device("cuda") == "cuda"


def test_each_process_has_its_own_gpu_and_the_first_one_speaks(launched):
    launched(1)
    assert (process_count(), process_rank(), is_main_process()) == (2, 1, False)
    assert [local_device(d) for d in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]


def test_a_batch_must_divide_among_the_processes(launched, tmp_path):
    launched(0, count=3)
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x", batch=8, micro_batch=4)
    with pytest.raises(UsageError, match="on 3 processes") as caught:
        fit_device(spec)
    assert caught.value.hint == "pass a multiple of 12 as --batch"


def test_fsdp_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x", device="cpu")
    with pytest.raises(UsageError, match="FSDP"):
        fit_device(spec)


def test_paged_optimizer_is_refused_on_a_cpu(tmp_path):
    spec = TrainSpec(
        source=tmp_path, out=tmp_path / "out", data="x", device="cpu", optimizer="paged_adamw_8bit"
    )
    with pytest.raises(UsageError, match="needs a GPU"):
        fit_device(spec)


@pytest.mark.parametrize("rank", [0, 1])
def test_other_commands_refuse_a_launcher_and_say_so_once(launched, capsys, rank):
    launched(rank)
    assert run_command(["prune", "--ratio", "0.5"]) == 2
    said = capsys.readouterr().err
    assert ("runs as one process, and a launcher started 2" in said) == (rank == 0)


def curve(directory):
    with (directory / "loss.csv").open() as file:
        return [(r["step"], r["split"], float(r["loss"])) for r in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["train", "align"])
def test_two_processes_learn_what_one_does(
    finished_run, instructions, text_file, tmp_path, command
):
    words = {
        "train": ["--data", instructions, "--dropout", "0", "--learning-rate", "1e-2"],
        "align": ["--data", text_file, "--block-length", "32"],
    }[command]
    words = [
        command, "--in", finished_run / "pruned", *words, "--steps", "4", "--batch", "8",
        "--micro-batch", "2", "--warmup-steps", "1", "--eval-steps", "2", "--save-steps", "2",
        "--gradient-checkpointing", "--device", "cpu", "--json",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = {}
    for name, start in (("one", []), ("two", launcher)):
        done = subprocess.run(
            [sys.executable, *start, "-m", "loram_cli", *map(str, words), "--out", tmp_path / name],
            env={**os.environ, "LORAM_RUN": str(finished_run), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told[name] = done
    # One object on stdout, not one per process.
    assert json.loads(told["two"].stdout)["fresh"]
    assert len(told["two"].stdout.strip().splitlines()) == 1
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert [row[2] for row in two] == pytest.approx([row[2] for row in one], abs=2e-5)
    assert one[-1][2] < one[0][2]
    files = [sorted(Manifest.read(tmp_path / name).outputs) for name in ("one", "two")]
    assert files[0] == files[1]
    assert not list(tmp_path.glob(".*"))
