"""The decision tables in the documentation are what ``memory-report --cards`` says."""

import pytest

from loram_cli.cli import which_way_page as which


@pytest.mark.slow
def test_the_tables_are_the_commands_own():
    text = which.PAGE.read_text("utf-8")
    assert which.page(text) == text, "run 'make docs'"


def test_only_the_tables_are_written_anew(monkeypatch):
    monkeypatch.setattr(which, "tables", lambda: "new")
    old = f"before {which.START}\nold\n{which.END} after"
    assert which.page(old) == f"before {which.START}\nnew\n{which.END} after"
