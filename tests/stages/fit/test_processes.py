"""One training on several processes: what the launcher's environment decides."""

import json
import socket
from dataclasses import replace

import pytest
from helpers.reporters import WarningRecorder
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from loram_cli.cli.app import run_command
from loram_cli.errors import UsageError
from loram_cli.reporting import NullReporter
from loram_cli.runs.processes import (
    LAUNCHER_SECONDS,
    is_lost_connection,
    is_main_process,
    local_device,
    may_speak,
    process_count,
    process_rank,
)
from loram_cli.stages.core.lifecycle import key_of
from loram_cli.stages.fit.launchers import as_launched
from loram_cli.stages.fit.run import fit_device
from loram_cli.stages.train.stage import TrainSpec


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
        fit_device(spec, NullReporter())
    assert caught.value.hint == "pass a multiple of 12 as --batch"


def test_the_launcher_may_ask_for_fsdp(launched, monkeypatch, tmp_path):
    launched(1)
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x", device="cpu")
    assert not as_launched(spec).fsdp
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert as_launched(spec).fsdp
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UsageError, match="offloading"):
        as_launched(spec)


def test_fsdp_wants_several_processes_and_a_plain_optimizer(launched, tmp_path):
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x", device="cpu", fsdp=True)
    with pytest.raises(UsageError, match="only this one"):
        as_launched(spec)
    launched(0)
    with pytest.raises(UsageError, match="paged_adamw_8bit cannot work on the slices"):
        as_launched(replace(spec, optimizer="paged_adamw_8bit"))


def test_whether_the_model_is_shared_out_is_not_in_the_key(tmp_path):
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x")
    keys = {key_of("train", each, {}) for each in (spec, replace(spec, fsdp=True))}
    assert len(keys) == 1


def test_paged_optimizer_is_refused_on_a_cpu(tmp_path):
    spec = TrainSpec(
        source=tmp_path, out=tmp_path / "out", data="x", device="cpu", optimizer="paged_adamw_8bit"
    )
    with pytest.raises(UsageError, match="needs a GPU"):
        fit_device(spec, NullReporter())


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda", "no such GPU; torch finds 0"),
        ("cuda:1", "no such GPU"),
        ("mps", "cannot train there"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, tmp_path, device, reason):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x", device=device)
    with pytest.raises(UsageError, match=reason):
        fit_device(spec, NullReporter())


@pytest.mark.parametrize(
    ("precision", "slow", "warned"), [("bf16", True, 1), ("bf16", False, 0), ("auto", True, 0)]
)
def test_a_cpu_without_bf16_is_told_what_it_takes(monkeypatch, tmp_path, precision, slow, warned):
    monkeypatch.setattr("loram_cli.stages.fit.run.slow_in_bf16", lambda device: slow)
    spec = TrainSpec(
        source=tmp_path, out=tmp_path / "out", data="x", device="cpu", precision=precision
    )
    recorder = WarningRecorder()
    assert fit_device(spec, recorder) == "cpu"
    assert sum("no instructions for it" in line for line in recorder.warnings) == warned


def test_more_processes_than_gpus_are_refused(launched, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launched(2, count=4)
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x", device="cuda")
    with pytest.raises(UsageError, match="cuda:2: no such GPU; torch finds 2") as caught:
        fit_device(spec, NullReporter())
    assert "one process for each GPU" in caught.value.hint


def test_another_way_to_train_is_refused(launched, monkeypatch, tmp_path):
    launched(0)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    spec = TrainSpec(source=tmp_path, out=tmp_path / "out", data="x", device="cpu")
    with pytest.raises(UsageError, match="asks for DeepSpeed"):
        as_launched(spec)


def test_the_reason_of_a_failure_is_left_for_the_launcher(launched, monkeypatch, tmp_path, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    launched(0)
    assert run_command(["prune", "--ratio", "0.5"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    told = ChildFailedError("loram_cli", {0: failure}).format_msg()
    assert "'loram prune' runs as one process" in told
    assert "error: 'loram prune' runs" in capsys.readouterr().err


def test_other_commands_refuse_a_launcher(launched, capsys):
    launched(0)
    assert run_command(["prune", "--ratio", "0.5"]) == 2
    assert "runs as one process, and a launcher started 2" in capsys.readouterr().err


def test_a_later_process_speaks_only_if_the_launcher_lets_it_live(launched, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("loram_cli.runs.processes.time.sleep", waited.append)
    launched(1)
    assert run_command(["prune", "--ratio", "0.5"]) == 2
    assert waited == [LAUNCHER_SECONDS]
    assert "runs as one process" in capsys.readouterr().err
    # Ctrl-C reaches every process, and the first one tells it.
    assert not may_speak(130)
    launched(0)
    assert may_speak(130)


def test_one_of_them_speaks_however_slow_the_launcher_is(launched, monkeypatch):
    monkeypatch.setattr("loram_cli.runs.processes.time.sleep", lambda seconds: None)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        spoke = []
        for rank in (1, 0, 1):
            launched(rank)
            spoke.append(may_speak(1))
        assert spoke == [True, False, False]
    # A launcher that is gone cannot be asked.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(unused.getsockname()[1]))
        assert may_speak(1)


def test_ctrl_c_is_told_by_the_first_process_alone(launched, monkeypatch, capsys, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("loram_cli.stages.train.stage.run", interrupted)
    monkeypatch.setattr("loram_cli.runs.processes.time.sleep", lambda seconds: None)
    for rank in (0, 1):
        launched(rank)
        assert run_command(["train", "--run", str(tmp_path), "--in", str(tmp_path)]) == 130
        assert ("error: interrupted" in capsys.readouterr().err) == (rank == 0)


def test_a_lost_connection_is_no_bug(launched):
    gone = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:3029")
    assert not is_lost_connection(gone)
    launched(1)
    assert is_lost_connection(gone)
    assert not is_lost_connection(RuntimeError("shapes do not match"))


def test_a_dry_run_tells_what_each_process_holds(launched, finished_run, instructions, capsys):
    launched(0)
    words = ["train", "--run", finished_run, "--data", instructions, "--dry-run", "--json"]
    words = [*map(str, words), "--out", str(finished_run / "other"), "--device", "cpu"]
    assert run_command(words) == 0
    (alone,) = json.loads(capsys.readouterr().out)["plans"]
    assert run_command([*words, "--fsdp"]) == 0
    (shared,) = json.loads(capsys.readouterr().out)["plans"]
    assert shared["processes"] == 2
    assert shared["memory_bytes"] < alone["memory_bytes"]
    assert shared["figures"]["lora_params"] == alone["figures"]["lora_params"]
