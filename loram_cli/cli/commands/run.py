"""``loram run``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "run"
EPILOG = "Example: loram run recipes/demo.yaml"


def command(
    recipe: Annotated[Path, typer.Argument(help="YAML file with the stages; see recipes/.")],
    run: Annotated[
        Path | None,
        typer.Option("--run", envvar="LORAM_RUN", help="Run directory; else the recipe's."),
    ] = None,
    model: options.Model = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.html into the run directory.")
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Run the stages of a recipe: what is done is skipped, what was interrupted goes on."""
    from dataclasses import asdict, replace

    from loram_cli import pipeline
    from loram_cli.cli.draw.console import print_json, show_result, stage_lines, stdout_console
    from loram_cli.cli.draw.scores import show_scores
    from loram_cli.config.recipe import load_recipe
    from loram_cli.runs.rundir import RunDirectory
    from loram_cli.stages.core.lifecycle import StageResult
    from loram_cli.units import format_bytes, format_params

    settings = options.settings()
    loaded = settings.over(load_recipe(recipe))
    if model is not None:
        loaded = replace(loaded, model=model)
    console = stdout_console()
    if dry_run:
        plan = pipeline.dry_run(loaded)
        if json_output:
            print_json(asdict(plan))
            return
        console.print(
            f"{loaded.model}: {format_params(plan.base_params)} -> "
            f"{format_params(plan.pruned_params)} "
            f"parameters to train on ({format_bytes(plan.pruned_weight_bytes)} in bf16, "
            f"{format_bytes(plan.nf4_weight_bytes)} in NF4)"
        )
        for stage in plan.stages:
            words = " ".join(f"{k}={v}" for k, v in plan.values.get(stage, {}).items())
            console.print(f"  {stage}: {words}".rstrip(": "))
        return
    directory = RunDirectory(run or loaded.run or settings.run or options.DEFAULT_RUN)

    def tell(result: StageResult) -> None:
        if not json_output:
            show_result(result, stage_lines(result), False, then=False)

    reporter = options.reporter_for(json_output)
    results = pipeline.run(loaded, directory, force=force, reporter=reporter, on_result=tell)
    if report:
        from loram_cli.tools.html_page import PAGE_NAME, write_page

        write_page(directory.path, directory.path / PAGE_NAME)
        reporter.note(f"wrote {directory.path / PAGE_NAME}")
    if json_output:
        print_json([result.to_mapping() for result in results])
        return
    for result in results:
        if result.stage == "eval":
            show_scores(result)
