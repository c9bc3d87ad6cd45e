"""Options of commands that are no settings of a stage, and what every command does with them."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.reporting import NullReporter, Reporter
from loram_cli.runs.processes import is_main_process
from loram_cli.runs.rundir import DEMO_MODEL, RunDirectory
from loram_cli.schema import RUN_PANEL, Spec, setting

if TYPE_CHECKING:
    from loram_cli.config.defaults import Place
    from loram_cli.config.settings import Settings
    from loram_cli.stages.core.lifecycle import StageResult
    from loram_cli.stages.core.plan import StagePlan

DEFAULT_RUN = Path("loram-run")
DRY_RUN: dict[str, Any] = {
    "switch": True,
    "help": "Check everything, print the plan, stop.",
    "panel": RUN_PANEL,
}
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class JsonOption(Spec):
    """Of every command."""

    json_output: bool = setting(
        False,
        flag="--json",
        switch=True,
        help="Print the result as one JSON object.",
        panel=RUN_PANEL,
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(JsonOption):
    """Of a command that works in a run directory."""

    run: Path | None = setting(
        None,
        env="LORAM_RUN",
        panel=RUN_PANEL,
        help="Run directory: holds every stage's output.",
        default_text=str(DEFAULT_RUN),
    )


@dataclass(frozen=True, kw_only=True)
class BaseOptions(RunOptions):
    """Of a command that takes the base model."""

    model: str | None = setting(
        None,
        env="LORAM_MODEL",
        help="Base model: a directory or hub id. Remembered by the run; else the demo base.",
    )


@dataclass(frozen=True, kw_only=True)
class StageOptions(RunOptions):
    """Of a stage."""

    push: str | None = setting(
        None,
        help="OWNER/NAME: upload the output to the hub (private when new).",
        panel=RUN_PANEL,
    )
    dry_run: bool = setting(False, **DRY_RUN)


@dataclass(frozen=True, kw_only=True)
class BaseStageOptions(StageOptions, BaseOptions):
    """Of a stage that takes the base model."""


def settings() -> "Settings":
    """What the working directory's settings file and the environment set."""
    from loram_cli.config.settings import load_settings

    return load_settings(Path.cwd(), os.environ)


def layered(stage: str, values: Values) -> Values:
    """The flags that were given, over what environment and settings file set for the stage.

    A stage that needs text and gets none takes the training data that they name.
    """
    from loram_cli.config.recipe import on_training_data

    known = settings()
    return on_training_data(stage, {**known.section(stage), **values}, known.section("train"))


def fetched(values: Values, reporter: Reporter) -> Values:
    """The values, with what ``--in`` and ``--pruned`` name on the hub as local directories.

    Raises:
        LoramError: See :func:`.local_output`.
    """
    named = {n: values[n] for n in ("source", "adapter", "pruned") if values.get(n) is not None}
    if not named:
        return values
    from loram_cli.stages.core.published import local_output

    return {**values, **{name: local_output(path, reporter) for name, path in named.items()}}


def settle(options: RunOptions, reporter: Reporter, *, at_hand: Path | None = None) -> "Place":
    """The run directory and the base model that a command is about; says so when it is the demo.

    Args:
        options: May name both.
        reporter: Told where settings come from, and of the demo base.
        at_hand: A directory that the command is pointed to (``--in``, ``--row``): unless told, the
            base is the one that it descends from, whatever the run is about.
    """
    from loram_cli.config.defaults import Place, base_of

    elsewhere = settings()
    if elsewhere.sources:
        reporter.note(f"settings from {', '.join(elsewhere.sources)}")
    directory = RunDirectory(options.run or elsewhere.run or DEFAULT_RUN)
    asked = getattr(options, "model", None)
    asked = elsewhere.model if asked is None else asked
    if asked is None and at_hand is not None:
        base = base_of(at_hand)
        if base is not None:
            return Place(directory, base)
    first = directory.remembered_model() is None
    name = directory.settle_model(asked, remember=False)
    if name == DEMO_MODEL and first and asked is None:
        reporter.note("no --model: using the embedded demo base")
    return Place(directory, name)


def model_at_hand(options: RunOptions, rows: Mapping[str, Sequence[Path]]) -> Path | None:
    """The model of the first row that was named, unless a run was that is about another one."""
    if options.run is not None and RunDirectory(options.run).remembered_model() is not None:
        return None
    return next((parts[0] for parts in rows.values()), None)


def tell_defaults(place: "Place", stage: str, values: Values, reporter: Reporter) -> None:
    """Print the settings that come from the demo base's own recipe, or the adapter's training."""
    from loram_cli.config.defaults import stage_defaults

    defaults = {k: v for k, v in stage_defaults(place, stage, values).items() if k not in values}
    if defaults:
        words = " ".join(f"{k.replace('_', '-')}={_word(v)}" for k, v in defaults.items())
        whose = (
            "as the adapter was trained"
            if stage == "polish"
            else ("defaults of the demo base's recipe")
        )
        reporter.note(f"{whose}: {words}")


def run_stage(
    name: str,
    stage: Any,
    values: Values,
    options: StageOptions,
    *,
    at_hand: str | None = None,
    fill: "Callable[[Place, Values], Any] | None" = None,
) -> "StageResult | None":
    """What every command of one stage does: fill the spec, plan or run, push, show.

    Args:
        name: The stage's.
        stage: Its module, with ``plan`` and ``run``.
        values: The flags that were given.
        options: Those that every stage has.
        at_hand: The name of the value that points to a directory; see :func:`settle`.
        fill: Makes the spec; as the stage's defaults say unless given.

    Returns:
        What was done; None for a dry run.
    """
    from loram_cli.cli.draw.console import show_result
    from loram_cli.config.defaults import FILL

    reporter = reporter_for(options.json_output)
    before_push(options.push)
    values = fetched(layered(name, values), reporter)
    pointed_to = None if at_hand is None else values.get(at_hand)
    place = settle(options, reporter, at_hand=pointed_to)
    tell_defaults(place, name, values, reporter)
    spec = (fill or FILL[name])(place, values)
    if options.dry_run:
        show_plans([stage.plan(spec, reporter, count=True)], options.json_output)
        return None
    result: StageResult = stage.run(spec, reporter)
    if name == "prune" and "out" not in values:
        place.run.settle_model(place.model)
    after_push(options.push, result, reporter)
    show_result(result, options.json_output)
    return result


def show_plans(plans: "Sequence[StagePlan[Any]]", json_output: bool) -> None:
    """Print plans, as lines or as one JSON object."""
    from loram_cli.cli.draw.plans import show_plans as show

    show(plans, json_output)


def before_push(repository: str | None) -> None:
    """Refuse a push that cannot succeed, before the work that it would come after."""
    if repository is not None:
        from loram_cli.tools.push import check_push

        check_push(repository)


def after_push(repository: str | None, result: "StageResult", reporter: Reporter) -> None:
    """Upload what a stage wrote."""
    if repository is not None:
        from loram_cli.tools.push import push

        push(result.wrote, repository, reporter)


def reporter_for(json_output: bool) -> Reporter:
    """The reporter of a command; it draws on stderr, and with ``--json`` tells no notes.

    Of several processes on one command only the first one speaks.
    """
    if not is_main_process():
        return NullReporter()
    from loram_cli.cli.draw.console import ConsoleReporter

    return ConsoleReporter(quiet_notes=json_output)


def comma_separated(text: str | None) -> tuple[str, ...] | None:
    """The words of ``a,b``; None stays None."""
    return None if text is None else tuple(w.strip() for w in text.split(",") if w.strip())


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
