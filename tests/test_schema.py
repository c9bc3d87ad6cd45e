from pathlib import Path

import pytest

from loram_cli.errors import UsageError
from loram_cli.schema import convert, unknown_name


def test_the_nearest_name_is_suggested():
    assert "did you mean 'taylor'?" in str(unknown_name("value", "tailor", ["l2", "taylor"], "x"))


def test_a_long_list_of_names_is_cut():
    text = str(unknown_name("task", "?", [f"name-{i}" for i in range(5000)], "--tasks"))
    assert "and 4984 more" in text
    assert len(text.splitlines()) == 2
    assert len(text) < 400


def test_a_path_is_never_empty_and_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(UsageError, match="--out: expected a path, and it is empty"):
        convert(Path, "", "--out")
    assert convert(Path | None, "~/runs", "--run") == Path("/home/me/runs")
