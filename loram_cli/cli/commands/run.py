"""``loram run``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loram_cli.cli.options import (
    DEFAULT_RUN,
    DRY_RUN,
    BaseOptions,
    Values,
    reporter_for,
    settings,
    show_plans,
)
from loram_cli.schema import setting

if TYPE_CHECKING:
    from loram_cli.stages.core.lifecycle import StageResult

NAME = "run"
EPILOG = "Example: loram run recipes/demo.yaml"


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(BaseOptions):
    """Which recipe, and how."""

    recipe: Path = setting(help="YAML file with the stages; see recipes/.", argument=True)
    force: bool = setting(False, switch=True, help="Replace existing outputs.")
    dry_run: bool = setting(False, **DRY_RUN)
    report: bool = setting(
        False, switch=True, help="Also write report.html into the run directory."
    )


SPEC, OPTIONS = None, RecipeOptions


def command(values: Values, options: RecipeOptions) -> None:
    """Run the stages of a recipe: what is done is skipped, what was interrupted resumes."""
    from loram_cli.cli.draw.console import print_json, show_result
    from loram_cli.cli.draw.scores import show_scores
    from loram_cli.config.recipe import load_recipe
    from loram_cli.runs.rundir import RunDirectory
    from loram_cli.tools.html_page import PAGE_NAME, write_page

    elsewhere = settings()
    recipe = elsewhere.over(load_recipe(options.recipe))
    from loram_cli import pipeline  # with torch behind it: first comes what is wrong in the recipe

    if options.model is not None:
        recipe = replace(recipe, model=options.model)
    directory = RunDirectory(options.run or recipe.run or elsewhere.run or DEFAULT_RUN)
    reporter = reporter_for(options.json_output)
    if options.dry_run:
        show_plans(pipeline.plan(recipe, directory, reporter), options.json_output)
        return

    def tell(result: "StageResult") -> None:
        if not options.json_output:
            show_result(result, False, then=False)

    results = pipeline.run(
        recipe, directory, force=options.force, reporter=reporter, on_result=tell
    )
    if options.report:
        write_page(directory.path, directory.path / PAGE_NAME)
        reporter.note(f"wrote {directory.path / PAGE_NAME}")
    if options.json_output:
        print_json([result.to_mapping() for result in results])
        return
    for result in results:
        if result.stage == "eval":
            show_scores(result)
