"""``loram memory-report``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "memory-report"
EPILOG = "Example: loram memory-report --preset llama2-70b --ratio 0.85"


def command(
    run: options.Run = None,
    model: options.Model = None,
    preset: Annotated[
        str | None,
        typer.Option(help="llama2-7b, llama2-13b, llama2-70b, llama3.1-8b or llama3.1-70b."),
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Pruning ratio; may be repeated.")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="rand, stru, semi or unst.")] = None,
    keep_first: Annotated[
        int | None, typer.Option(help="First layers kept whole. (default: 4)")
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option(help="Last layers kept whole. (default: 2)")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA r. (default: 8)")] = None,
    json_output: options.Json = False,
) -> None:
    """Tell parameters and weight memory of base, pruned and NF4 models, without loading any."""
    from loram_cli.cli.render import print_json, stdout_console
    from loram_cli.specs import spec_from_mapping
    from loram_cli.stages import report, resolve

    values = options.given(
        preset=preset,
        ratios=tuple(ratio) if ratio else None,
        strategy=strategy,
        keep_first=keep_first,
        keep_last=keep_last,
        rank=rank,
    )
    reporter = options.reporter_for(json_output)
    if preset is None:
        directory, name = options.settle(run, model, reporter, remember=False)
        base = Path(name) if Path(name).is_file() else resolve.model_dir(name)
        values["model"] = base
        if directory.is_done("prune") and not ratio and model is None:
            values["pruned"] = directory.output("prune")
    elif model is not None:
        values["model"] = Path(model)
    result = report.run(
        spec_from_mapping(report.MemoryReportSpec, values, "memory-report"), reporter
    )
    if json_output:
        print_json(result.to_mapping())
        return
    console = stdout_console()
    console.print(memory_table(result))
    for note in result.notes:
        console.print(note)


def memory_table(result: object) -> object:
    """The report as a table: a row per model and precision."""
    from rich import box
    from rich.table import Table

    from loram_cli.units import GIB, MIB, format_params

    # One unit for the whole table, so that its rows compare; a tiny model would be 0.00 GiB.
    large = max(row.weight_bytes for row in result.rows) >= GIB / 2
    unit, unit_bytes = ("GiB", GIB) if large else ("MiB", MIB)
    table = Table(
        title=f"{result.source}: parameters and weight memory",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    names = (
        "model", "parameters", "removed", "paper count", "reduction", f"paper {unit}",
        f"weights {unit}", "LoRA", f"training {unit}*",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in result.rows:
        table.add_row(
            f"{row.name} {row.precision}",
            f"{row.params:,}",
            f"{row.removed_share:.1%}",
            f"{row.paper_params:,}",
            f"{row.paper_reduction:.2f}x",
            f"{row.paper_weight_bytes / unit_bytes:.2f}",
            f"{row.weight_bytes / unit_bytes:.2f}",
            format_params(row.lora_params),
            f"{row.training_bytes_without_activations / unit_bytes:.2f}",
        )
    return table
