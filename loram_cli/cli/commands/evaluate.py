"""``loram eval``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loram_cli.cli.options import (
    DEFAULT_RUN,
    DRY_RUN,
    BaseOptions,
    Values,
    comma_separated,
    layered,
    model_at_hand,
    reporter_for,
    settings,
    settle,
    show_plans,
    tell_defaults,
)
from loram_cli.errors import UsageError
from loram_cli.runs.rundir import RunDirectory
from loram_cli.schema import setting
from loram_cli.stages.evaluate.spec import EvalSpec

NAME = "eval"
EPILOG = "Example: loram eval --tasks gsm8k,humaneval --task-data gsm8k=test.jsonl --limit 200"
ROWS_HELP = "Comma-separated: base, pruned, recovered, merged, polished, full-lora."
ROW_HELP = "NAME=DIR[+ADAPTER], a model of your own; may be repeated."


@dataclass(frozen=True, kw_only=True)
class EvalOptions(BaseOptions):
    """What is no setting of the evaluation itself."""

    rows: str | None = setting(None, help=ROWS_HELP, default_text="all")
    row: tuple[str, ...] = setting((), help=ROW_HELP, repeat=True)
    export: Path | None = setting(None, help="Also write the table here: .md, .csv, .json or .png.")
    show: bool = setting(
        False, switch=True, help="Show saved outputs, rows side by side; run nothing."
    )
    only: Literal["wrong", "right", "differ"] | None = setting(
        None, help="With --show: wrong, right, or differ (rows disagree)."
    )
    task: str | None = setting(None, help="With --show: one task.")
    count: int = setting(5, flag="-n", help="With --show: documents at most.", at_least=1)
    dry_run: bool = setting(False, **DRY_RUN)


SPEC, OPTIONS = EvalSpec, EvalOptions


def command(values: Values, options: EvalOptions) -> None:
    """Compare base, pruned and recovered models on the same held-out tasks."""
    from loram_cli.cli.draw.console import print_json, show_result
    from loram_cli.cli.draw.scores import show_scores
    from loram_cli.config.defaults import eval_spec
    from loram_cli.config.rows import chosen_rows, parse_rows
    from loram_cli.stages.evaluate import stage

    if options.show:
        run = RunDirectory(options.run or settings().run or DEFAULT_RUN)
        _show(values.get("out") or run.output(NAME), options)
        return
    if options.only is not None or options.task is not None:
        raise UsageError("--only and --task go with --show", "to evaluate one task: --tasks NAME")
    own = parse_rows(options.row)
    values = layered(NAME, values)
    reporter = reporter_for(options.json_output)
    place = settle(options, reporter, at_hand=model_at_hand(options, own))
    tell_defaults(place, NAME, values, reporter)
    spec = eval_spec(place, values)
    spec = replace(spec, rows=chosen_rows(spec.rows, comma_separated(options.rows), own))
    if options.dry_run:
        show_plans([stage.plan(spec, reporter)], options.json_output)
        return
    result = stage.run(spec, reporter)
    if options.export is not None:
        stage.export_results(result, options.export)
    if options.json_output:
        print_json(result.to_mapping())
        return
    show_result(result, options.json_output)
    show_scores(result)


def _show(directory: Path, options: EvalOptions) -> None:
    from loram_cli.cli.draw.console import print_json
    from loram_cli.cli.draw.scores import documents_mapping, show_documents
    from loram_cli.evaluation.samples import load_documents

    documents = load_documents(
        directory,
        rows=comma_separated(options.rows),
        task=options.task,
        only=options.only,
        limit=options.count,
    )
    if options.json_output:
        print_json(documents_mapping(documents))
        return
    show_documents(documents)
