"""``loram bench``."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from loram_cli.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from loram_cli.tools.bench import BenchResult, BenchRow

NAME = "bench"
EPILOG = "Example: loram bench train --row llama2-13b --row llama2-13b:0.65"


def command(
    what: Annotated[str, typer.Argument(help="What to measure: train.")] = "train",
    preset: Annotated[
        str | None, typer.Option(help="Measure this preset at --ratio and --quantize.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Pruning ratio of --preset. (default: 0, the base)")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="nf4: weights in 4 bits.")] = None,
    multiple_of: options.MultipleOf = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            "--row", help="PRESET[:RATIO[:nf4][:xN]], xN: --multiple-of; may be repeated."
        ),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The rows of the paper's Table 8, and 70B QLoRAM.")
    ] = False,
    micro_batch: options.StepMicroBatch = None,
    length: options.StepLength = None,
    steps: Annotated[int | None, typer.Option(help="Timed steps. (default: 8)")] = None,
    rank: options.Rank = None,
    dropout: options.Dropout = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    cross_entropy: options.CrossEntropy = None,
    attention: options.StepAttention = None,
    optimizer: options.Optimizer = None,
    device: options.Device = None,
    seed: options.Seed = None,
    json_output: options.Json = False,
) -> None:
    """Take real training steps on random weights of true shapes: peak memory and throughput."""
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.errors import UsageError
    from loram_cli.schema import spec_from_mapping
    from loram_cli.tools import bench

    if what != "train":
        raise UsageError(f"bench {what}: only 'train' can be measured")
    if preset is None and (ratio, quantize, multiple_of) != (None, None, None):
        raise UsageError(
            "--ratio, --quantize and --multiple-of are for --preset", "pass --preset NAME, or --row"
        )
    if quantize not in (None, "nf4"):
        raise UsageError(f"--quantize {quantize}: only nf4 is known")
    if multiple_of is not None and multiple_of < 1:
        raise UsageError("--multiple-of must be above 0")
    rows = [*(row or ()), *(bench.PAPER_ROWS if paper else ())]
    if preset is not None:
        rows.append(str(bench.BenchModel(preset, ratio or 0.0, quantize, multiple_of or 1)))
    values = {
        "rows": tuple(rows),
        "micro_batch": micro_batch,
        "length": length,
        "steps": steps,
        "rank": rank,
        "dropout": dropout,
        "gradient_checkpointing": gradient_checkpointing,
        "cross_entropy": cross_entropy,
        "attention": attention,
        "optimizer": optimizer,
        "device": device,
        "seed": seed,
    }
    spec = spec_from_mapping(
        bench.BenchSpec, {k: v for k, v in values.items() if v is not None}, "bench"
    )
    result = bench.run(spec, options.reporter_for(json_output))
    if json_output:
        print_json(result.to_mapping())
        return
    console = stdout_console()
    console.print(bench_table(result))
    for note in result.notes:
        console.print(note)


def bench_table(result: "BenchResult") -> "Table":
    """A row per model: predicted and measured peak, and throughput."""
    from rich import box
    from rich.table import Table

    from loram_cli.units import format_bytes, format_params

    cards = ", ".join(dict.fromkeys(row.device for row in result.rows))
    table = Table(
        title=f"training on {cards}", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1)
    )
    columns: dict[str, Callable[[BenchRow], str | None]] = {
        "model": lambda row: row.label,
        "parameters": lambda row: format_params(row.params),
        "predicted": lambda row: format_bytes(row.predicted_bytes),
        "measured": lambda row: row.failure or format_bytes(row.measured_bytes),
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
