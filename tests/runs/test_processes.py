"""The launcher's variables."""

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import UsageError
from loram_cli.runs import processes


def test_an_empty_variable_is_none(monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    assert (processes.process_count(), processes.process_rank()) == (1, 0)
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.startswith("loram ")


@pytest.mark.parametrize("value", ["x", "-1", "0", "1.5", "9" * 30, "1 2"])
def test_what_is_no_number_of_processes_is_named(value, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", value)
    assert run_command(["--version"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: WORLD_SIZE is '{value}', expected a number from 1")
    assert len(lines) == 2


@pytest.mark.parametrize("value", ["x", "2", "-1"])
def test_what_is_no_number_of_a_process_is_named(value, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", value)
    with pytest.raises(UsageError, match="RANK is"):
        processes.process_rank()
    assert run_command(["align", "--dry-run"]) == 2
    assert f"RANK is '{value}'" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", value)
    if value != "2":
        with pytest.raises(UsageError, match="LOCAL_RANK is"):
            processes.local_device("cuda")
