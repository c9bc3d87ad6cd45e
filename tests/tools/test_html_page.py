import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.tools.html_page import render_page, write_page

VOID = {"meta", "br", "link", "img"}


class Structure(HTMLParser):
    """Checks that tags close, and collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(finished_run: Path, tmp_path: Path, capsys):
    out = tmp_path / "deep" / "page.html"
    assert run_command(["report", "--run", str(finished_run), "--out", str(out)]) == 0
    page = out.read_text()
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert all(link.startswith("#") for link in structure.links)
    assert "script" not in structure.seen
    assert not re.search(r"@import|url\((?!#)", page)
    assert structure.seen.count("svg") == 2
    assert structure.seen.count("details") == 6
    labels = re.findall(r"<tr><td>(base|pruned|recovered|merged)</td>", page)
    assert labels == ["base", "pruned", "recovered", "merged"]
    assert page.count('class="best"') in (1, 2)
    assert page.count("layer ") >= 4


def test_names_are_escaped(run_copy: Path):
    (run_copy / "run.json").write_text('{"model": "<b>model</b>"}')
    assert "<b>model" not in render_page(run_copy).partition("<h2>")[0]


def test_a_folder_without_a_finished_stage_is_refused(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"model": "demo"}')
    with pytest.raises(LoramError, match="no stage of a run is finished"):
        render_page(tmp_path)


def test_a_folder_is_no_place_for_a_page(finished_run: Path, tmp_path: Path):
    for place in (tmp_path, Path(), Path("/")):
        with pytest.raises(UsageError, match="is a folder, expected a file"):
            write_page(finished_run, place)
    assert list(tmp_path.iterdir()) == []


def test_only_a_page_is_replaced(finished_run: Path, tmp_path: Path):
    file, link = tmp_path / "thesis.tex", tmp_path / "page.html"
    file.write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex: exists and is no HTML page"):
        write_page(finished_run, file)
    assert file.read_text() == "years of work"
    file.write_text("<!DOCTYPE html>\nan earlier one")
    link.symlink_to(file)
    write_page(finished_run, link)
    assert link.is_symlink() and "an earlier one" not in file.read_text()
    assert sorted(tmp_path.iterdir()) == [link, file]


def test_results_that_were_changed_are_not_shown(run_copy: Path):
    file = run_copy / "eval" / "results.json"
    file.write_text(file.read_text().replace('"value"', '"Value"'))
    with pytest.raises(LoramError, match=r"results\.json: is not the file that 'eval' wrote"):
        render_page(run_copy)
