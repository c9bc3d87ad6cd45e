"""Draws measurements: a row per model, predicted and measured."""

from collections.abc import Callable

from rich import box
from rich.table import Table

from loram_cli.tools.bench import BenchResult, BenchRow
from loram_cli.units import format_bytes, format_params


def bench_table(result: BenchResult) -> Table:
    """A row per model: predicted and measured peak, and throughput."""
    cards = ", ".join(dict.fromkeys(row.device for row in result.rows))
    table = Table(
        title=f"training on {cards}", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1)
    )
    columns: dict[str, Callable[[BenchRow], str | None]] = {
        "model": lambda row: row.label,
        "parameters": lambda row: format_params(row.params),
        "predicted": lambda row: format_bytes(row.predicted_bytes),
        "measured": lambda row: row.failure or format_bytes(row.measured_bytes or 0),
        "off by": lambda row: _told(row.deviation, "{:+.1%}"),
        "reserved": lambda row: format_bytes(row.reserved_bytes) if row.reserved_bytes else None,
        "s/step": lambda row: _told(row.seconds_per_step, "{:.3f}"),
        "samples/s": lambda row: _told(row.samples_per_second, "{:.2f}"),
        "of LoRA": lambda row: _told(row.speedup, "{:.2f}x"),
    }
    cells = {name: [cell(row) for row in result.rows] for name, cell in columns.items()}
    # What no row has, as the deviation on a CPU, takes no column.
    shown = {name: found for name, found in cells.items() if any(found)}
    for name in shown:
        table.add_column(name, justify="left" if name == "model" else "right")
    for place in range(len(result.rows)):
        table.add_row(*(found[place] or "-" for found in shown.values()))
    return table


def _told(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)
