import csv
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError
from loram_cli.stages.fit import run as fit_run
from loram_cli.training import tracking

real_find_spec = importlib.util.find_spec


def without(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in names else real_find_spec(n, *a)
    )


def words_of(run: Path, out: Path, data: object, trackers: str) -> list[str]:
    """Two steps of training on a run's pruned model."""
    words = ["train", "--in", run / "pruned", "--out", out, "--data", data]
    words += ["--report-to", trackers, "--run", out.parent / "run", "--steps", "2"]
    words += ["--batch", "2", "--micro-batch", "2", "--max-length", "64"]
    return [str(word) for word in words]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "swanlab"])
def test_an_absent_package_is_named_before_any_work(
    name: str, finished_run: Path, instructions: Path, tmp_path: Path, monkeypatch, capsys
):
    without(monkeypatch, name)
    assert run_command(words_of(finished_run, tmp_path / "out", instructions, name)) == 1
    err = capsys.readouterr().err
    assert f"the package {name} is not installed" in err
    assert f"pip install 'loram[{name}]'" in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_a_usage_error(finished_run: Path, tmp_path: Path, capsys):
    assert run_command(words_of(finished_run, tmp_path / "out", "x", "tensorbord")) == 2
    assert "did you mean 'tensorboard'" in capsys.readouterr().err


def test_nothing_asked_for_is_nothing_imported():
    tracking.check_trackers(())
    assert tracking.tracking_callbacks((), Path("nowhere")) == []
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(LoramError, match="--report-to wandb"):
        tracking.check_trackers(("wandb",))


def test_losses_reach_the_tracker(
    finished_run: Path, instructions: Path, tmp_path: Path, monkeypatch
):
    """Through the Trainer, with a writer that records in place of tensorboard's own."""
    from transformers.integrations import integration_utils

    logged: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = Path(log_dir)
            self.log_dir.mkdir()
            (self.log_dir / "events").write_text("x")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            logged.append((name, value, step))

        def __getattr__(self, name: str):
            return lambda *args, **kwargs: None

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(fit_run, "check_trackers", lambda names: None)
    words = words_of(finished_run, tmp_path / "out", instructions, "tensorboard")
    assert run_command([*words, "--eval-data", str(instructions)]) == 0
    assert {step for name, _, step in logged if name == "train/loss"} == {1, 2}
    assert (tmp_path / "out" / "tensorboard" / "events").is_file()


def trained(
    run: Path, instructions: Path, folder: Path, trackers: str, **environment: str
) -> list[tuple[str, int, float]]:
    """Train in a process of its own, with the trackers' own packages; gives the curve."""
    for name in trackers.split(","):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'loram[{trackers}]'")
    words = words_of(run, folder / "out", instructions, trackers)
    done = subprocess.run(
        [sys.executable, "-m", "loram_cli", *words, "--eval-data", str(instructions)],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (folder / "out" / "loss.csv").open() as file:
        return [
            (row["split"], int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_the_real_packages_write_the_losses_of_the_curve(
    finished_run: Path, instructions: Path, tmp_path: Path
):
    """With tensorboard's and wandb's own files, offline; where both are installed."""
    curve = trained(finished_run, instructions, tmp_path, "tensorboard,wandb", WANDB_MODE="offline")
    assert len(curve) == 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    for split in ("train", "eval"):
        logged = [(split, event.step, event.value) for event in events.Scalars(f"{split}/loss")]
        wanted = [row for row in curve if row[0] == split]
        assert [row[:2] for row in logged] == [row[:2] for row in wanted]
        assert [row[2] for row in logged] == pytest.approx([row[2] for row in wanted], abs=2e-6)
    # wandb has no reader of its own file; the values stand in it as text.
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    text = file.read_bytes().decode("latin-1")
    for split, _, loss in curve:
        values = re.findall(rf"{split}/loss[^\d-]{{1,6}}(\d+\.\d+)", text)
        # The length before a value may itself be a digit.
        assert any(str(loss)[:6] in value for value in values), (split, loss, values)


def refused(monkeypatch, package: types.ModuleType, callback: str, error: Exception) -> LoramError:
    """What the user sees where a stand-in for a tracker's package refuses to begin."""
    from transformers.integrations import integration_utils

    def refuse(*args, **kwargs):
        raise error

    name = package.__name__
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    monkeypatch.setattr(getattr(integration_utils, callback), "setup", refuse)
    (made,) = tracking.tracking_callbacks((name,), Path("nowhere"))
    with pytest.raises(LoramError) as caught:
        made.setup(None, None, None)
    return caught.value


def test_what_wandb_refuses_is_one_line(monkeypatch):
    """Such as an absent login."""
    fake = types.ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})
    said = refused(monkeypatch, fake, "WandbCallback", fake.Error("No API key configured.\nmore"))
    assert "wandb: No API key configured. more\nrun 'wandb login'" in str(said)


def test_what_mlflow_refuses_is_one_line(monkeypatch):
    fake = types.ModuleType("mlflow")
    refusal = type("MlflowException", (Exception,), {})
    fake.exceptions = types.SimpleNamespace(MlflowException=refusal)
    fake.utils = types.SimpleNamespace(
        validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=9, MAX_PARAMS_TAGS_PER_BATCH=9)
    )
    said = refused(monkeypatch, fake, "MLflowCallback", refusal("no server at http://x\nmore"))
    assert "mlflow: no server at http://x more\nset MLFLOW_TRACKING_URI" in str(said)


def test_swanlab_begins_its_run_where_there_is_none(monkeypatch):
    """From 0.10 on ``get_run`` raises there, which transformers' callback does not expect."""
    from transformers.integrations import integration_utils

    begun = []
    fake = types.ModuleType("swanlab")

    def get_run():
        if not begun:
            raise RuntimeError("No active Run. Call swanlab.init() first.")
        return begun[0]

    fake.get_run, fake.init = get_run, lambda **given: begun.append(given)
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    monkeypatch.setattr(integration_utils, "is_swanlab_available", lambda: True)
    monkeypatch.setattr(integration_utils.SwanLabCallback, "setup", lambda *a, **k: fake.get_run())
    (callback,) = tracking.tracking_callbacks(("swanlab",), Path("nowhere"))
    callback.setup(None, None, None)
    callback.setup(None, None, None)
    assert begun == [{"project": "mine"}]

    def refuse(**given):
        raise RuntimeError("no TTY is available for interactive login.")

    begun.clear()
    fake.init = refuse
    with pytest.raises(LoramError, match=r"swanlab: no TTY .*\nrun 'swanlab login'"):
        callback.setup(None, None, None)


@pytest.mark.slow
def test_mlflow_and_swanlab_write_the_losses(
    finished_run: Path, instructions: Path, tmp_path: Path
):
    """Their own files, offline; where both are installed."""
    curve = trained(
        finished_run, instructions, tmp_path, "mlflow,swanlab", SWANLAB_MODE="offline",
        MLFLOW_TRACKING_URI=f"file://{tmp_path / 'mlruns'}", MLFLOW_ALLOW_FILE_STORE="true",
    )  # fmt: skip
    losses = [loss for split, _, loss in curve if split == "train"]
    (file,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    logged = [float(line.split()[1]) for line in file.read_text().splitlines()]
    assert logged == pytest.approx(losses, abs=1e-5)
    assert list((tmp_path / "swanlog").glob("run-*"))
