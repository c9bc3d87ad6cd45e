"""``train --stream``: the adapter of the resident training, byte by byte, and what goes with it."""

import os
import signal
from contextlib import contextmanager

import pytest
from helpers.slow import slow
from helpers.tiny_models import make_base

from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.train import stage
from loram_cli.stages.train.spec import TrainSpec

SILENT = NullReporter()


def spec_of(base, instructions, out, **changes):
    how = {
        "steps": 4, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup_steps": 0,
        "max_length": 48, "eval_examples": 2, "eval_steps": 2, "save_steps": 1, "device": "cpu",
        **changes,
    }  # fmt: skip
    return TrainSpec(source=base, out=out, data=str(instructions), **how)


def weights(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        slow({"quantize": "nf4"}),
        slow({"offload_activations": True}),
    ],
    ids=["plain", "nf4", "file"],
)
def test_the_adapter_is_the_resident_trainings(base, instructions, tmp_path, changes):
    if changes.get("quantize"):
        pytest.importorskip("bitsandbytes")
    plain = {k: v for k, v in changes.items() if k == "quantize"}
    stage.run(spec_of(base, instructions, tmp_path / "resident", **plain), SILENT)
    stage.run(spec_of(base, instructions, tmp_path / "streamed", stream=True, **changes), SILENT)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "resident")
    loss = (tmp_path / "streamed" / "loss.csv").read_text()
    assert loss == (tmp_path / "resident" / "loss.csv").read_text()
    # The way there decides nothing: both have the same key.
    keys = {Manifest.read(tmp_path / name).key for name in ("streamed", "resident")}
    assert len(keys) == 1


def test_interrupted_it_resumes_where_it_was(base, instructions, tmp_path):
    class Stops(NullReporter):
        @contextmanager
        def progress(self, label, total, unit="it"):
            with super().progress(label, total, unit) as progress:
                yield Stopping(progress) if label == "train" else progress

    class Stopping:
        def __init__(self, progress):
            self.detail, self.skip, self.steps = progress.detail, progress.skip, 0

        def advance(self, steps=1):
            self.steps += steps
            if self.steps == 2:
                os.kill(os.getpid(), signal.SIGINT)

    stage.run(spec_of(base, instructions, tmp_path / "whole", stream=True), SILENT)
    cut = spec_of(base, instructions, tmp_path / "cut", stream=True)
    with pytest.raises(KeyboardInterrupt):
        stage.run(cut, Stops())
    assert not (tmp_path / "cut").exists()
    stage.run(cut, SILENT)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_on_full_trains_the_runs_base(base, instructions, tmp_path, capsys):
    run = tmp_path / "run"
    prune = ["prune", "--run", run, "--model", base, "--strategy", "rand", "--ratio", 0.5]
    prune += ["--keep-first", 1, "--keep-last", 1]
    assert run_command(list(map(str, prune))) == 0
    capsys.readouterr()
    words = ["train", "--run", run, "--on", "full", "--stream", "--data", instructions, "--steps"]
    words += [1, "--batch", 2, "--micro-batch", 1, "--max-length", 48, "--json"]
    assert run_command(list(map(str, words))) == 0
    assert str(run / "full-lora") in capsys.readouterr().out
    inputs = Manifest.read(run / "full-lora").inputs
    assert inputs["source"]["path"] == str(base)
    assert run_command([*map(str, words), "--in", str(base)]) == 2
    assert "--on full is the run's base" in capsys.readouterr().err


@pytest.fixture(scope="module")
def recovered(base, instructions, tmp_path_factory):
    """A run with a recovered adapter."""
    run = tmp_path_factory.mktemp("recovered") / "run"
    small = ["--data", instructions, "--steps", 2, "--batch", 2, "--micro-batch", 1]
    for words in (
        ["prune", "--model", base, "--strategy", "rand", "--ratio", 0.5, "--keep-first", 1],
        ["train", *small, "--max-length", 48, "--learning-rate", "1e-2", "--warmup-steps", 0],
        ["recover"],
    ):
        assert run_command([*map(str, words), "--run", str(run)]) == 0
    return run


def test_a_recovered_adapter_is_polished_on_the_full_model(recovered, base, instructions, tmp_path):
    from_there = {"from_adapter": recovered / "recovered", "steps": 2}
    for name, stream in (("streamed", True), ("resident", False)):
        spec = spec_of(base, instructions, tmp_path / name, stream=stream, **from_there)
        stage.run(spec, SILENT)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "resident")
    before = LoraAdapter.read(recovered / "recovered").pairs
    after = LoraAdapter.read(tmp_path / "streamed").pairs
    filled = [(before[name].lora_b == 0) & (after[name].lora_b != 0) for name in before]
    # Rows of what was pruned are zero after a recovery, and learn here.
    assert any(bool(at.any()) for at in filled)
    manifest = Manifest.read(tmp_path / "streamed")
    assert manifest.inputs["adapter"]["path"] == str(recovered / "recovered")
    assert run_command(["verify", str(tmp_path / "streamed")]) == 0


def test_a_recovered_adapter_of_another_base_is_refused(recovered, instructions, tmp_path):
    other = make_base(tmp_path / "other", seed=9)
    spec = spec_of(
        other, instructions, tmp_path / "out", stream=True, from_adapter=recovered / "recovered"
    )
    with pytest.raises(LoramError, match="was trained on another model: weights differ"):
        stage.plan(spec, SILENT)


def test_a_plan_tells_the_smaller_memory(base, instructions, tmp_path):
    resident, streamed = (
        stage.plan(spec_of(base, instructions, tmp_path / "out", stream=stream), SILENT)
        for stream in (False, True)
    )
    assert streamed.memory_bytes < resident.memory_bytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "dpo", "stream": True}, "--stream does not go with --objective dpo"),
        ({"fsdp": True, "stream": True}, "--stream does not go with --fsdp"),
        ({"cross_entropy": "full", "stream": True}, "--cross-entropy full"),
        ({"offload_activations": True}, "--offload-activations goes with --stream"),
    ],
)
def test_what_does_not_go_with_it_is_told(base, instructions, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        spec_of(base, instructions, tmp_path / "out", **changes)


def test_several_processes_are_refused(base, instructions, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    spec = spec_of(base, instructions, tmp_path / "out", stream=True)
    with pytest.raises((UsageError, LoramError), match="--stream runs in one process"):
        stage.plan(spec, SILENT)
