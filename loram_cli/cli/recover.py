"""``loram recover``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "recover"
EPILOG = "Example: loram recover --merge"


def command(
    run: options.Run = options.DEFAULT_RUN,
    model: options.Model = None,
    adapter: Annotated[
        Path | None, typer.Option("--in", help="Adapter directory, not the run's.")
    ] = None,
    out: options.Out = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write the full merged checkpoint.")
    ] = False,
    merge_out: Annotated[
        Path | None, typer.Option(help="Where the merged checkpoint goes.")
    ] = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Scatter the small LoRA factors back to the full model's shapes, and check them."""
    from loram_cli.cli.render import print_json, show_result, stage_lines
    from loram_cli.stages import recover, resolve

    reporter = options.reporter_for(json_output)
    directory, name = options.settle(run, model, reporter, remember=False)
    values = options.given(adapter=adapter, out=out, force=force)
    result = recover.run(resolve.recover_spec(directory, name, values), reporter)
    if not merge:
        show_result(result, stage_lines(result), json_output)
        return
    values = options.given(adapter=result.wrote, out=merge_out, force=force)
    merged = recover.merge(resolve.merge_spec(directory, name, values), reporter)
    if json_output:
        print_json({"recover": result.to_mapping(), "merge": merged.to_mapping()})
        return
    show_result(result, stage_lines(result), json_output)
    show_result(merged, stage_lines(merged), json_output)
