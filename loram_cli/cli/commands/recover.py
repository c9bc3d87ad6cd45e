"""``loram recover``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "recover"
EPILOG = "Example: loram recover --merge"


def command(
    run: options.Run = None,
    model: options.Model = None,
    adapter: Annotated[
        Path | None, typer.Option("--in", help="Adapter directory, not the run's.")
    ] = None,
    out: options.Out = None,
    merge: Annotated[
        bool | None,
        typer.Option("--merge/--no-merge", help="Also write the full merged checkpoint."),
    ] = None,
    merge_out: Annotated[
        Path | None, typer.Option(help="Where the merged checkpoint goes.")
    ] = None,
    push: options.Push = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json_output: options.Json = False,
) -> None:
    """Scatter the small LoRA factors back to the full model's shapes, and check them."""
    from loram_cli.cli.draw.console import print_json, show_result, stage_lines
    from loram_cli.cli.draw.plans import show_plans
    from loram_cli.config import defaults as resolve
    from loram_cli.stages.recover import merge as merge_stage
    from loram_cli.stages.recover import stage as recover

    reporter = options.reporter_for(json_output)
    options.before_push(push)
    directory, name = options.settle(run, model, reporter, remember=False)
    values = options.layered(NAME, adapter=adapter, out=out, force=force, merge=merge)
    merge = values.pop("merge", False)
    spec = resolve.recover_spec(directory, name, values)
    places = options.given(adapter=spec.out, out=merge_out, force=force)
    merging = resolve.merge_spec(directory, name, places) if merge else None
    if dry_run:
        show_plans(merge_stage.plan_both(spec, merging), json_output)
        return
    result = recover.run(spec, reporter)
    options.after_push(push, result, reporter)
    if merging is None:
        show_result(result, stage_lines(result), json_output)
        return
    merged = merge_stage.run(merging, reporter)
    options.after_push(push and f"{push}-merged", merged, reporter)
    if json_output:
        print_json({"recover": result.to_mapping(), "merge": merged.to_mapping()})
        return
    show_result(result, stage_lines(result), json_output)
    show_result(merged, stage_lines(merged), json_output)
