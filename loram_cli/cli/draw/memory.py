"""The memory report on a terminal: three tables, bars, and what fits."""

import sys
from collections.abc import Iterator

from rich import box
from rich.table import Table

from loram_cli.cli.draw.console import stdout_console
from loram_cli.tools.fit_ways import Way
from loram_cli.tools.memory_report import MemoryReport
from loram_cli.units import GIB, common_unit, format_bytes, format_params, format_seconds

# A glyph per part of a bar, in the order of ``Bar.parts``: one that terminals have, and plain ones.
_GLYPHS = ("█", "▓", "▒", "░", "·")
_PLAIN_GLYPHS = ("#", "=", "+", "-", ".")
_BAR_COLUMNS = 60
_AS_FAST = 1.05


def show_report(result: MemoryReport) -> None:
    """Print the report."""
    console = stdout_console()
    if result.cards:
        console.print(card_table(result))
        return
    console.print(weights_table(result))
    console.print(state_table(result))
    console.print(training_table(result))
    if result.streams:
        console.print(stream_table(result))
    for line in bar_lines(result, _glyphs(sys.stdout.encoding)):
        console.print(line)
    console.print()
    for line in (*way_lines(result), *fit_lines(result)):
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
    rows = [row for row in result.rows if row.precision != "nf4"]
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
            row.name if row.precision == "bf16" else f"{row.name} {row.precision}",
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
        cells = [
            f"{row.name} {row.method}",
            *(f"{part / unit_bytes:.2f}" for part in parts),
            _card(row.smallest_card_gib),
        ]
        if result.fit_bytes is not None:
            cells.append(str(row.largest_micro_batch or "none"))
        table.add_row(*cells)
    for stream in result.streams:
        parts = (
            stream.weight_bytes, stream.training_state_bytes, stream.activation_bytes,
            stream.logits_bytes, stream.context_bytes, stream.training_bytes,
        )  # fmt: skip
        cells = [
            stream.name,
            *(f"{part / unit_bytes:.2f}" for part in parts),
            _card(stream.smallest_card_gib),
        ]
        table.add_row(*cells, *(["-"] if result.fit_bytes is not None else []))
    return table


def stream_table(result: MemoryReport) -> Table:
    """The base layer by layer: memory on both sides, traffic and least time of a step."""
    streams = result.streams
    unit, unit_bytes = common_unit(max(row.training_bytes for row in streams))
    table = _table(
        f"the full model layer by layer (train --on full --stream), in {unit}\n{_speeds(result)}",
        ("model", "GPU", "offload", "card", "RAM", "from RAM", "or disk", "s/step", "or",
         "tokens/s"),
    )  # fmt: skip
    for row in streams:
        table.add_row(
            row.name.removeprefix("stream "),
            f"{row.training_bytes / unit_bytes:.2f}",
            f"{row.offloaded_training_bytes / unit_bytes:.2f}",
            _card(row.offloaded_card_gib),
            f"{row.host_bytes / unit_bytes:.0f}",
            f"{row.bus_bytes / unit_bytes:.0f}",
            f"{row.disk_bytes / unit_bytes:.0f}",
            _short(row.bus_seconds),
            _short(row.disk_seconds),
            f"{row.tokens_per_second:.0f}",
        )
    return table


CARD_COLUMNS = ("card", "way", "s/step", "GPU", "RAM", "exact", "flags of train")


def card_table(result: MemoryReport) -> Table:
    """The ways to train on each of the common cards, fastest first."""
    table = Table(
        title=f"which way for my card: {result.source}\n{step_said(result)}",
        box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1),
    )  # fmt: skip
    for name in CARD_COLUMNS:
        table.add_column(name, justify="right" if name in ("s/step", "GPU", "RAM") else "left")
    for cells in card_rows(result):
        table.add_row(*cells)
    return table


def card_rows(result: MemoryReport) -> Iterator[list[str]]:
    """The cells of :func:`card_table`; GPU and RAM in GiB."""
    for card in result.cards:
        for place, way in enumerate(card.ways):
            yield [
                "" if place else f"{card.gib} GB",
                way.name,
                _short(way.seconds),
                f"{way.training_bytes / GIB:.1f}",
                f"{way.host_bytes / GIB:.0f}" if way.host_bytes else "-",
                "yes" if way.exact else "no",
                way.flags.strip() or "-",
            ]
        if not card.ways:
            yield [f"{card.gib} GB", "none", *["-"] * 5]


def step_said(result: MemoryReport) -> str:
    """What a step is, and how fast its machine, in words."""
    batch = max(row.batch for row in result.streams)
    return f"a step is {batch} examples of {result.setup.length} tokens; {_speeds(result)}"


def way_lines(result: MemoryReport) -> Iterator[str]:
    """All ways that fit the memory asked about, in words to choose by."""
    if result.fit_bytes is None or not (result.ways or result.fits):
        return
    memory = format_bytes(result.fit_bytes)
    if not result.ways:
        yield f"no way to train {result.source} fits {memory}"
        return
    yield f"ways to train {result.source} in {memory}, fastest first"
    yield f"({step_said(result)})"
    for place, way in enumerate(result.ways, 1):
        yield f"{place:>3}. {way.name}: {format_seconds(way.seconds)} a step, " + (
            f"{format_bytes(way.training_bytes)} on the GPU"
            + (f", {format_bytes(way.host_bytes)} of RAM" if way.host_bytes else "")
        )
        yield f"     {_way_said(way, result)}"
        yield from (f"     {command}" for command in way.commands)
    if {way.kind for way in result.ways} >= {"pruned", "streamed"}:
        yield "  both: LoRAM for most steps, then 'loram polish': a few exact ones, layer by layer"
    yield ""
    if result.fits:
        yield "with the table's settings as they are:"


def _way_said(way: Way, result: MemoryReport) -> str:
    if way.kind == "resident":
        return "exact: the full model is on the GPU; there is nothing to prune"
    if way.kind == "pruned":
        base = format_params(result.rows[0].params)
        return (
            f"approximate: trains on {format_params(way.params)} of {base} parameters; the "
            "adapter serves all"
        )
    assert way.disk_seconds is not None
    slower = way.disk_seconds > _AS_FAST * way.seconds
    from_disk = format_seconds(way.disk_seconds) if slower else "as fast"
    return (
        f"exact: the full model, layer by layer; without the RAM for it, {from_disk} from the disk"
    )


def _speeds(result: MemoryReport) -> str:
    speeds = result.speeds
    return (
        f"floors at {speeds.flops / 1e12:g} TFLOP/s, RAM {speeds.bus / 1e9:g} and "
        f"disk {speeds.disk / 1e9:g} GB/s, {speeds.start_seconds * 1e3:g} ms a layer"
    )


def _short(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _card(gib: int | None) -> str:
    return "none" if gib is None else f"{gib} GB"


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
