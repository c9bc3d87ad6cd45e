import importlib.util
import sys
import types
from pathlib import Path

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError
from loram_cli.training import tracking

real_find_spec = importlib.util.find_spec


def without(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in names else real_find_spec(n, *a)
    )


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_an_absent_package_is_named_before_any_work(
    name: str, finished_run: Path, instructions: Path, tmp_path: Path, monkeypatch, capsys
):
    without(monkeypatch, name)
    words = ["train", "--in", finished_run / "pruned", "--out", tmp_path / "out"]
    words += ["--data", instructions, "--report-to", name, "--run", tmp_path / "run"]
    assert run_command([str(word) for word in words]) == 1
    err = capsys.readouterr().err
    assert f"the package {name} is not installed" in err
    assert f"pip install 'loram[{name}]'" in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_a_usage_error(finished_run: Path, tmp_path: Path, capsys):
    words = ["train", "--in", finished_run / "pruned", "--out", tmp_path / "out"]
    words += ["--data", "x", "--report-to", "tensorbord", "--run", tmp_path / "run"]
    assert run_command([str(word) for word in words]) == 2
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
    monkeypatch.setattr(tracking, "check_trackers", lambda names: None)
    words = ["train", "--in", finished_run / "pruned", "--out", tmp_path / "out"]
    words += ["--data", instructions, "--report-to", "tensorboard", "--run", tmp_path / "run"]
    words += ["--eval-data", instructions]
    words += ["--steps", "2", "--batch", "2", "--micro-batch", "2", "--max-length", "64"]
    assert run_command([str(word) for word in words]) == 0
    assert {step for name, _, step in logged if name == "train/loss"} == {1, 2}
    assert (tmp_path / "out" / "tensorboard" / "events").is_file()
