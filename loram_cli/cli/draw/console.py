"""Progress, notes and tables on a terminal, and their plain forms elsewhere."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from loram_cli.cli.draw.results import result_lines
from loram_cli.reporting import Progress as ProgressProtocol
from loram_cli.runs.processes import is_main_process
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.stages.core.lineage import fits_base
from loram_cli.units import format_bytes, format_seconds

_PLAIN_SECONDS = 10.0
_NEXT = {
    "prune": "loram align (or loram train, to skip alignment)",
    "align": "loram train",
    "train": "loram recover",
    "recover": 'loram eval (or loram generate "a prompt"; or loram polish before)',
    "merge": 'loram eval (or loram generate "a prompt")',
}


class ConsoleReporter:
    """Draws on stderr: bars on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, quiet_notes: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._quiet = quiet_notes

    def note(self, line: str) -> None:
        """Print a note."""
        if not self._quiet:
            self._console.print(escape(line), style="dim")

    def warn(self, line: str) -> None:
        """Print a warning."""
        self._console.print(f"warning: {escape(line)}", style="yellow")

    @contextmanager
    def progress(
        self, label: str, total: float | None, unit: str = "it"
    ) -> Iterator[ProgressProtocol]:
        """Open a bar, or plain lines when stderr is no terminal."""
        if not self._console.is_terminal:
            plain = _PlainProgress(self._console, label, total, unit)
            yield plain
            plain.finish()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(label, total=total or 0, detail="", rate="")
            yield _BarProgress(bars, task, unit)


class _BarProgress:
    def __init__(self, bars: Progress, task: TaskID, unit: str) -> None:
        self._bars, self._task, self._unit = bars, task, unit
        self._started, self._done = time.monotonic(), 0.0

    def skip(self, steps: float) -> None:
        self._bars.update(self._task, advance=steps)

    def advance(self, steps: float = 1) -> None:
        self._done += steps
        rate = format_rate(self._done, time.monotonic() - self._started, self._unit)
        self._bars.update(self._task, advance=steps, rate=rate)

    def detail(self, text: str) -> None:
        self._bars.update(self._task, detail=text)


def format_rate(done: float, seconds: float, unit: str) -> str:
    """Such as ``3.2 step/s``, or ``4.5 s/step`` for slow steps; empty before the first one."""
    if not done or seconds <= 0:
        return ""
    rate = done / seconds
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit}"


class _PlainProgress:
    def __init__(self, console: Console, label: str, total: float | None, unit: str) -> None:
        self._console, self._label, self._total, self._unit = console, label, total, unit
        self._started = self._told = time.monotonic()
        self._done = self._told_done = self._skipped = 0.0
        self._detail = ""

    def skip(self, steps: float) -> None:
        self._skipped += steps

    def advance(self, steps: float = 1) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._told >= _PLAIN_SECONDS:
            self._told = now
            self._line(now)

    def detail(self, text: str) -> None:
        self._detail = text

    def finish(self) -> None:
        if self._told != self._started and self._done > self._told_done:
            self._line(time.monotonic())

    def _line(self, now: float) -> None:
        self._told_done = self._done
        seconds = now - self._started
        of_total = f"/{self._total:.0f}" if self._total else ""
        done = self._skipped + self._done
        parts = [f"{self._label}: {done:.0f}{of_total} {self._unit}"]
        parts.append(format_rate(self._done, seconds, self._unit))
        if self._total and self._done and done < self._total:
            left = (self._total - done) * seconds / self._done
            parts.append(f"{format_seconds(left)} left")
        self._console.print(escape(", ".join(filter(None, [*parts, self._detail]))))


def show_result(result: StageResult, json_output: bool, *, then: bool = True) -> None:
    """Print what a stage did: JSON, or what was read and written, a few figures, what is next."""
    if not is_main_process():
        return
    if json_output:
        print_json(result.to_mapping())
        return
    console = stdout_console()
    state = "" if result.fresh else " (was done already; --force redoes it)"
    console.print(f"{result.stage}: read {result.read}, wrote {result.wrote}{state}")
    for line in result_lines(result.result):
        console.print(f"  {line}")
    if (result.wrote / "loss.png").is_file():
        console.print(f"  loss curve: {result.wrote / 'loss.png'}, {result.wrote / 'loss.csv'}")
    if result.fresh:
        console.print(
            f"  took {format_seconds(result.manifest.wall_seconds)}, "
            f"peak memory {format_bytes(result.manifest.peak_memory_bytes)} "
            f"({format_bytes(result.manifest.peak_memory_increase_bytes)} above the start)"
        )
    stage = "merge" if fits_base(result.manifest) else result.stage
    if then and stage in _NEXT:
        console.print(f"next: {_NEXT[stage]}")


def stdout_console() -> Console:
    """Stdout, wide enough for tables when it is not a terminal."""
    width = None if sys.stdout.isatty() else max(130, shutil.get_terminal_size().columns)
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
