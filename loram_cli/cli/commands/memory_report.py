"""``loram memory-report``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "memory-report"
EPILOG = "Example: loram memory-report --preset llama2-70b --ratio 0.85 --fit 24GiB"


def command(
    run: options.Run = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            envvar="LORAM_MODEL",
            help="Base model: a directory, a config.json or a hub id (its config alone is "
            "fetched). Else the run's, or the demo base.",
        ),
    ] = None,
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
    multiple_of: options.MultipleOf = None,
    rank: options.Rank = None,
    micro_batch: options.StepMicroBatch = None,
    length: options.StepLength = None,
    dropout: options.Dropout = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    cross_entropy: options.CrossEntropy = None,
    attention: options.Attention = None,
    optimizer: options.Optimizer = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Share the model out among so many (train --fsdp): what each one holds."),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option("--fit", help="Which ratio and micro-batch fit so much memory, e.g. 24GiB."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the bars into this PNG file.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Tell what training base, pruned and NF4 models takes, without loading any."""
    from loram_cli.cli.draw.console import print_json
    from loram_cli.cli.draw.memory import show_report
    from loram_cli.config import defaults as resolve
    from loram_cli.schema import spec_from_mapping
    from loram_cli.tools import memory_report as report
    from loram_cli.units import parse_bytes

    values = options.given(
        preset=preset,
        ratios=tuple(ratio) if ratio else None,
        strategy=strategy,
        keep_first=keep_first,
        keep_last=keep_last,
        multiple_of=multiple_of,
        rank=rank,
        micro_batch=micro_batch,
        length=length,
        gradient_checkpointing=gradient_checkpointing,
        cross_entropy=cross_entropy,
        attention=attention,
        optimizer=optimizer,
        processes=processes,
        fit_bytes=None if fit is None else parse_bytes(fit),
    )
    if dropout is not None:
        values["dropout"] = dropout
    reporter = options.reporter_for(json_output)
    if preset is None:
        directory, name = options.settle(run, model, reporter, remember=False)
        base = Path(name) if Path(name).is_file() else resolve.model_dir(name, config_only=True)
        values["model"] = base
        if directory.is_done("prune") and not ratio and model is None:
            values["pruned"] = directory.output("prune")
    elif model is not None:
        values["model"] = Path(model)
    result = report.run(
        spec_from_mapping(report.MemoryReportSpec, values, "memory-report"), reporter
    )
    if plot is not None:
        from loram_cli.memory.picture import draw_bars

        draw_bars(result.bars(), plot, f"{result.source}: training memory\n{result.settings}")
        reporter.note(f"wrote {plot}")
    if json_output:
        print_json(result.to_mapping())
        return
    show_report(result)
