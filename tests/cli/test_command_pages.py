"""The pages in ``loram_cli/docs`` say what the commands say."""

import re
from pathlib import Path

import pytest

from loram_cli.cli import command_pages as pages
from loram_cli.cli.commands.table import COMMANDS, build

DOCS = pages.FOLDER.parent


@pytest.mark.parametrize("name", sorted(pages.pages()))
def test_the_page_is_the_commands_own_help(name: str):
    assert (pages.FOLDER / name).read_text("utf-8") == pages.pages()[name], "run 'make docs'"


def test_no_page_is_of_a_command_that_is_gone():
    assert {file.name for file in pages.FOLDER.iterdir()} == set(pages.pages())


def test_writing_removes_what_is_stale(tmp_path: Path):
    (tmp_path / "old.md").write_text("x")
    pages.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(pages.pages())
    assert "`--ratio X`" in (tmp_path / "prune.md").read_text()


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*.md")), ids=lambda f: f.name)
def test_links_lead_somewhere(file: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text("utf-8")):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


def test_every_command_line_in_the_docs_is_one():
    """``loram WORD --flag``: the word is a command and has the flag."""
    commands = {name: build(name) for name in COMMANDS}
    flags = {
        name: {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
        for name, command in commands.items()
    }
    seen = 0
    for file in DOCS.glob("*.md"):
        for line in re.findall(r"^ {4}loram (.+)$", file.read_text("utf-8"), re.MULTILINE):
            words = line.split()
            if words[0].startswith("-"):
                continue
            assert words[0] in commands, line
            given = {word for word in words[1:] if word.startswith("--")}
            assert given <= flags[words[0]] | {"--help"}, line
            seen += 1
    assert seen > 8
