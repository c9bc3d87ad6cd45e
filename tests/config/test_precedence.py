"""The order of flag, environment, file and default, through the commands themselves."""

import inspect
import json
from pathlib import Path

import pytest

from loram_cli.cli import options
from loram_cli.cli.app import run_command
from loram_cli.cli.commands.table import COMMANDS, load
from loram_cli.cli.from_spec import command_of
from loram_cli.config.recipe import SPECS, setting_types

pytestmark = pytest.mark.integration

KEEP = {"LORAM_PRUNE_KEEP_FIRST": "1", "LORAM_PRUNE_KEEP_LAST": "1"}


def plan(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert run_command(["prune", "--dry-run", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)["plans"][0]["figures"]["result"]


def test_flag_before_environment_before_file(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {"strategy": "rand", "keep_first": 0, "ratio": 0.25}
    Path("loram.yaml").write_text(json.dumps({"model": str(base), "prune": settings}))
    monkeypatch.setenv("LORAM_PRUNE_KEEP_FIRST", "1")
    monkeypatch.setenv("LORAM_PRUNE_KEEP_LAST", "1")
    assert plan(capsys)["pruned_layers"] == [1, 2]
    quarter = plan(capsys)["widths"]["1"]
    monkeypatch.setenv("LORAM_PRUNE_RATIO", "0.5")
    half = plan(capsys)["widths"]["1"]
    assert quarter[1] == 3
    assert half[1] == 2
    assert plan(capsys, "--ratio", "0.75")["widths"]["1"][1] == 1


def test_run_directory_and_model_come_from_the_file(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {"strategy": "rand", "keep_first": 1, "keep_last": 1, "ratio": 0.5}
    Path("loram.yaml").write_text(
        json.dumps({"model": str(base), "run": "my-run", "prune": settings})
    )
    assert run_command(["prune"]) == 0
    assert "settings from loram.yaml" in capsys.readouterr().err
    assert Path("my-run/pruned/loram.json").is_file()
    assert json.loads(Path("my-run/run.json").read_text())["model"] == str(base)
    monkeypatch.setenv("LORAM_RUN", "env-run")
    assert run_command(["prune"]) == 0
    assert Path("env-run/pruned/loram.json").is_file()


def test_an_unknown_variable_stops_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAM_TRAIN_STEP", "3")
    assert run_command(["train", "--data", "x"]) == 2
    assert "did you mean 'LORAM_TRAIN_STEPS'" in capsys.readouterr().err


def test_no_flag_turns_off_what_the_file_turned_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loram.yaml").write_text("train:\n  gradient_checkpointing: true\n")
    on = options.layered("train", {})
    off = options.layered("train", {"gradient_checkpointing": False})
    assert on == {"gradient_checkpointing": True}
    assert off == {"gradient_checkpointing": False}


def test_switches_that_a_file_can_set_have_no_default_of_their_own():
    """A flag with the default False would always win over the file."""
    seen = 0
    for module in map(load, COMMANDS):
        known = setting_types(module.NAME) if module.NAME in SPECS else {}
        command = command_of(module.command, module.SPEC, module.OPTIONS)
        for name, parameter in inspect.signature(command).parameters.items():
            if known.get(name) is bool:
                assert parameter.default is None, f"{module.NAME} {name}"
                seen += 1
    assert seen > 5
