"""A real headless browser: pictures of a page, and how wide it comes out."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Asks a page in a frame of a given width how wide its content is, and what sticks out.
_PROBE = """<!doctype html><body style="margin:0">
<iframe src="{page}" style="width:{width}px;height:{height}px;border:0"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const inside = event.target.contentDocument, seen = inside.documentElement;
  const out = [...inside.querySelectorAll("body *")].filter(element =>
    element.getBoundingClientRect().right > {width} + 1 && !element.closest(".scroll, svg"));
  document.title = JSON.stringify({{
    width: seen.scrollWidth, height: seen.scrollHeight,
    out: out.slice(0, 5).map(element => element.tagName + "." + element.className),
    headings: [...inside.querySelectorAll("h2")].map(element => element.textContent),
    empty: [...inside.querySelectorAll(".histogram i, .bars b, svg")].filter(
      element => element.getBoundingClientRect().height < 0.5).length}});
}};</script>"""


def browser() -> str:
    """The browser's program, or a skip."""
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here: apt-get install chromium")


def _run(page: Path, folder: Path, *words: str) -> str:
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=10000", *words, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(page: Path, folder: Path, width: int, height: int = 900) -> dict:
    """A page's layout in a window of a width: see the probe."""
    probe = folder / f"probe-{width}.html"
    probe.write_text(_PROBE.format(page=page.as_uri(), width=width, height=height))
    found = re.search(r"<title>(.*?)</title>", _run(probe, folder, "--dump-dom"), re.DOTALL)
    assert found is not None
    return json.loads(unescape(found[1]))


def picture(page: Path, folder: Path, width: int, height: int) -> Path:
    """A PNG of a page, in a frame of a width: a window cannot be as narrow as a telephone."""
    frame = folder / f"frame-{width}.html"
    frame.write_text(
        f'<!doctype html><body style="margin:0"><iframe src="{page.as_uri()}" '
        f'style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    out = folder / f"page-{width}.png"
    _run(frame, folder, f"--screenshot={out}", f"--window-size={max(width, 500)},{height}")
    return out
