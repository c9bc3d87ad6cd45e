"""The memory report on a terminal: three tables, bars, and what fits."""

import sys
from collections.abc import Iterator

from rich import box
from rich.table import Table

from loram_cli.cli.draw.console import stdout_console
from loram_cli.tools.memory_report import MemoryReport
from loram_cli.units import common_unit, format_bytes, format_params

# A glyph per part of a bar, in the order of ``Bar.parts``: one that terminals have, and plain ones.
_GLYPHS = ("█", "▓", "▒", "░", "·")
_PLAIN_GLYPHS = ("#", "=", "+", "-", ".")
_BAR_COLUMNS = 60


def show_report(result: MemoryReport) -> None:
    """Print the report."""
    console = stdout_console()
    console.print(weights_table(result))
    console.print(state_table(result))
    console.print(training_table(result))
    for line in bar_lines(result, _glyphs(sys.stdout.encoding)):
        console.print(line)
    console.print()
    for line in fit_lines(result):
        console.print(line)
    for note in result.notes:
        console.print(f"- {note}")


def weights_table(result: MemoryReport) -> Table:
    """Parameters and weights: a row per model and precision."""
    # One unit for the whole table, so that its rows compare; a tiny model would be 0.00 GiB.
    unit, unit_bytes = common_unit(max(row.weight_bytes for row in result.rows))
    table = _table(
        f"{result.source}: parameters and weight memory",
        ("model", "parameters", "removed", "paper count", "reduction", f"paper {unit}",
         f"weights {unit}"),
    )  # fmt: skip
    for row in result.rows:
        table.add_row(
            f"{row.name} {row.precision}",
            f"{row.params:,}",
            f"{row.removed_share:.1%}",
            f"{row.paper_params:,}",
            f"{row.paper_reduction:.2f}x",
            f"{row.paper_weight_bytes / unit_bytes:.2f}",
            f"{row.weight_bytes / unit_bytes:.2f}",
        )
    return table


def state_table(result: MemoryReport) -> Table:
    """LoRA factors, gradients and moments: a row per model, of whatever precision."""
    rows = [row for row in result.rows if row.precision == "bf16"]
    unit, unit_bytes = common_unit(max(row.training_bytes for row in rows))
    table = _table(
        f"training state in {unit}: LoRA of rank {result.rank}, {result.setup.optimizer}",
        ("model", "LoRA", "adapter", "gradients", "optimizer", "state"),
    )
    for row in rows:
        parts = (
            row.adapter_bytes, row.gradient_bytes, row.optimizer_bytes, row.training_state_bytes,
        )  # fmt: skip
        table.add_row(
            row.name,
            format_params(row.lora_params),
            *(f"{part / unit_bytes:.2f}" for part in parts),
        )
    return table


def training_table(result: MemoryReport) -> Table:
    """Training memory by part, and the smallest card that holds it."""
    unit, unit_bytes = common_unit(max(row.training_bytes for row in result.rows))
    columns = ["model", "weights", "state", "activations", "loss", "CUDA", unit, "card"]
    if result.fit_bytes is not None:
        columns.append("batch")
    table = _table(f"training memory in {unit}\n{result.settings}", columns)
    for row in result.rows:
        parts = (
            row.weight_bytes, row.training_state_bytes, row.activation_bytes, row.logits_bytes,
            row.context_bytes, row.training_bytes,
        )  # fmt: skip
        card = row.smallest_card_gib
        cells = [
            f"{row.name} {row.method}",
            *(f"{part / unit_bytes:.2f}" for part in parts),
            "none" if card is None else f"{card} GB",
        ]
        if result.fit_bytes is not None:
            cells.append(str(row.largest_micro_batch or "none"))
        table.add_row(*cells)
    return table


def bar_lines(result: MemoryReport, glyphs: tuple[str, ...] = _GLYPHS) -> Iterator[str]:
    """The same as bars, on one scale, with the cards marked below it."""
    bars = result.bars()
    most = max(bar.total_bytes for bar in bars)
    column_bytes = most / _BAR_COLUMNS
    margin = max(len(bar.label) for bar in bars)
    for bar in bars:
        drawn, done, before = "", 0, 0
        for glyph, (_, part_bytes) in zip(glyphs, bar.parts, strict=True):
            done += part_bytes
            columns = round(done / column_bytes) - before
            drawn += glyph * columns
            before += columns
        yield f"{bar.label:<{margin}} {drawn} {format_bytes(bar.total_bytes)}"
    names = [name for name, _ in bars[0].parts]
    yield " " * (margin + 1) + "  ".join(
        f"{glyph} {name}" for glyph, name in zip(glyphs, names, strict=True)
    )


def fit_lines(result: MemoryReport) -> Iterator[str]:
    """What fits the memory asked about."""
    if result.fit_bytes is None:
        return
    memory = format_bytes(result.fit_bytes)
    for fit in result.fits:
        base, pruned = ("QLoRA", "QLoRAM") if fit.precision == "nf4" else ("LoRA", "LoRAM")
        needed = format_bytes(fit.training_bytes or 0)
        if fit.ratio is None:
            yield f"{memory}: {pruned} fits at no ratio with these settings"
        elif fit.ratio == 0:
            yield f"{memory}: {base} on the base itself fits ({needed})"
        else:
            yield (
                f"{memory}: {pruned} (rand, stru) fits from ratio {fit.ratio:.2f} on: "
                f"{format_params(fit.remaining_params or 0)} parameters, "
                f"{needed}"
            )
    if any(fit.ratio is None for fit in result.fits):
        yield from _what_makes_it_smaller(result)
    yield f"batch: the largest micro-batch in {memory}, a twentieth of it left free"


def _what_makes_it_smaller(result: MemoryReport) -> Iterator[str]:
    """The flags that take less memory and are not given."""
    setup = result.setup
    flags = [] if setup.gradient_checkpointing else ["--gradient-checkpointing"]
    flags += ["--micro-batch 1"] if setup.micro_batch > 1 else []
    flags += ["--cross-entropy chunked"] if setup.cross_entropy == "full" else []
    if flags:
        yield f"less memory: {', '.join(flags)}"


def _table(title: str, columns: tuple[str, ...] | list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    for name in columns:
        table.add_column(name, justify="left" if name == "model" else "right")
    return table


def _glyphs(encoding: str | None) -> tuple[str, ...]:
    try:
        "".join(_GLYPHS).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_GLYPHS
    return _GLYPHS
