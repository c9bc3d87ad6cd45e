"""Progress, notes and tables on a terminal, and their plain forms elsewhere."""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from loram_cli.cli.draw.widths import width_advice
from loram_cli.reporting import Progress as ProgressProtocol
from loram_cli.runs.processes import is_main_process
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.units import format_bytes, format_params, format_seconds

_PLAIN_SECONDS = 10.0
_NEXT = {
    "prune": "loram align (or loram train, to skip alignment)",
    "align": "loram train",
    "train": "loram recover",
    "recover": 'loram eval (or loram generate "a prompt")',
    "merge": "loram eval",
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


def show_result(
    result: StageResult, lines: Sequence[str], json_output: bool, *, then: bool = True
) -> None:
    """Print what a stage did: JSON, or what was read and written, a few figures, what is next.

    Args:
        result: Of the stage.
        lines: Its figures.
        json_output: Print one JSON object instead.
        then: Name the next command; not where a recipe goes on by itself.
    """
    if not is_main_process():
        return
    if json_output:
        print_json(result.to_mapping())
        return
    console = stdout_console()
    state = "" if result.fresh else " (was done already; --force redoes it)"
    console.print(f"{result.stage}: read {result.read}, wrote {result.wrote}{state}")
    for line in lines:
        console.print(f"  {line}")
    if result.fresh:
        console.print(
            f"  took {format_seconds(result.manifest.wall_seconds)}, "
            f"peak memory {format_bytes(result.manifest.peak_memory_bytes)} "
            f"({format_bytes(result.manifest.peak_memory_increase_bytes)} above the start)"
        )
    if then and result.stage in _NEXT:
        console.print(f"next: {_NEXT[result.stage]}")


def stage_lines(result: StageResult) -> list[str]:
    """The figures worth showing of a stage's result."""
    r = result.manifest.results
    if result.stage == "prune":
        return [f"{format_params(r['base_params'])} -> {prune_line(r)}", *width_advice(r)]
    if result.stage in ("align", "train"):
        lines = []
        if result.stage == "train":
            trained_on = format_params(r["trained_on_params"])
            lines.append(f"LoRA of {format_params(r['lora_params'])} parameters on {trained_on}")
        if r.get("objective", "sft") != "sft":
            lines += _objective_lines(r)
        elif r.get("eval_loss_before") is not None:
            before, after = r["eval_loss_before"], r["eval_loss_after"]
            cost = f"{r['steps']} steps" if r["steps"] else f"{r['tokens']} tokens"
            lines.append(f"held-out loss {before:.4f} -> {after:.4f} in {cost}")
        if (result.wrote / "loss.png").is_file():
            lines.append(f"loss curve: {result.wrote / 'loss.png'}, {result.wrote / 'loss.csv'}")
        return lines
    if result.stage == "recover":
        return [
            f"{r['modules']} modules verified: kept rows and columns equal, zero elsewhere; "
            f"{format_params(r['small_params'])} -> {format_params(r['full_params'])} parameters"
        ]
    return []


def _objective_lines(results: dict[str, Any]) -> list[str]:
    """What preference and policy training reached on held-out data."""
    lines = []
    if "eval_reward_accuracy_after" in results:
        accuracy, margin = (results[f"eval_reward_{k}_after"] for k in ("accuracy", "margin"))
        lines.append(
            f"held-out preferences: {accuracy:.1%} right, reward margin {margin:.3f} "
            f"(0 at the start) in {results['steps']} steps"
        )
    if "eval_reward_after" in results:
        before, after = results["eval_reward_before"], results["eval_reward_after"]
        lines.append(
            f"held-out reward {before:.3f} -> {after:.3f} in {results['steps']} steps "
            "(one answer drawn per question)"
        )
    return lines


def prune_line(results: dict[str, Any]) -> str:
    """What is left after pruning, by plan or by count."""
    left, share = format_params(results["pruned_params"]), results["removed_share"]
    on_disk = format_bytes(results["weight_bytes"])
    if results.get("sparsity"):
        return (
            f"{left} parameters that are not zero ({share:.1%} of all zeroed); "
            f"zeros take their place: {on_disk} on disk and in memory, as before"
        )
    return (
        f"{left} parameters: {results['reduction']:.2f}x smaller "
        f"({share:.1%} of all parameters removed), {on_disk} on disk"
    )


def stdout_console() -> Console:
    """Stdout, wide enough for tables when it is not a terminal."""
    width = None if sys.stdout.isatty() else max(130, shutil.get_terminal_size().columns)
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
