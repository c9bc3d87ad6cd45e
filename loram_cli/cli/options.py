"""Options that several commands share, and how a command turns flags into values."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loram_cli.reporting import Reporter
from loram_cli.runs.rundir import DEMO_MODEL, RunDirectory

Run = Annotated[
    Path,
    typer.Option("--run", envvar="LORAM_RUN", help="Run directory: holds every stage's output."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Base model: a directory or hub id. Remembered by the run; else the demo base.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Output directory, instead of the run's own.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all random choices.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU when there is one.")
]

DEFAULT_RUN = Path("loram-run")


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were given: everything but None and False."""
    return {
        name: value for name, value in flags.items() if value is not None and value is not False
    }


def settle(
    run: Path, model: str | None, reporter: Reporter, *, remember: bool = True
) -> tuple[RunDirectory, str]:
    """The run directory and its base model; says so when it is the demo base."""
    directory = RunDirectory(run)
    first = directory.remembered_model() is None
    name = directory.settle_model(model, remember=remember)
    if name == DEMO_MODEL and first and model is None:
        reporter.note("no --model: using the embedded demo base")
    return directory, name


def tell_defaults(model: str, stage: str, values: dict[str, Any], reporter: Reporter) -> None:
    """Print the settings that come from the demo base's own recipe."""
    from loram_cli.stages.resolve import stage_defaults

    defaults = {k: v for k, v in stage_defaults(model, stage, values).items() if k not in values}
    if defaults:
        words = " ".join(f"{k.replace('_', '-')}={_word(v)}" for k, v in defaults.items())
        reporter.note(f"defaults of the demo base's recipe: {words}")


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def reporter_for(json_output: bool) -> Reporter:
    """The reporter of a command; it draws on stderr, and with ``--json`` tells no notes."""
    from loram_cli.cli.render import ConsoleReporter

    return ConsoleReporter(quiet_notes=json_output)
