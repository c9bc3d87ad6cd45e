"""The page of requirements names the versions that the tests run with."""

import re
from pathlib import Path

import pytest

import loram_cli

ROOT = Path(loram_cli.__file__).parents[1]
PAGE = (ROOT / "loram_cli" / "docs" / "requirements.md").read_text()
PINNED = dict(
    re.match(r"([\w.-]+)==([^\s;]+)", line).groups()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
)
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    if len(cells) == 4 and re.match(r"\d", cells[1]) and cells[0] != "Python"
}


def test_the_table_is_there():
    assert {"torch", "transformers", "peft", "trl", "bitsandbytes", "gguf"} <= set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_its_versions_are_those_of_the_constraints(name):
    pinned = next(v for k, v in PINNED.items() if k.replace("-", "_") == name)
    for cell in ROWS[name]:
        assert cell.startswith(pinned.partition("+")[0]), f"{name}: {cell}, constraints: {pinned}"


def test_other_versions_are_told_as_they_are_pinned():
    assert f"(in `dev`) | {PINNED['openai']} |" in PAGE
    assert f"loram-{loram_cli.__version__}-py3-none-any.whl" in PAGE
