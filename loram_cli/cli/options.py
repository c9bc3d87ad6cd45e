"""Options that several commands share, and how a command turns flags into values."""

import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loram_cli.reporting import NullReporter, Reporter
from loram_cli.runs.processes import is_main_process
from loram_cli.runs.rundir import DEMO_MODEL, RunDirectory

Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        envvar="LORAM_RUN",
        help="Run directory: holds every stage's output. (default: loram-run)",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        envvar="LORAM_MODEL",
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
Fsdp = Annotated[
    bool | None,
    typer.Option("--fsdp/--no-fsdp", help="Under torchrun: share the model out (FSDP)."),
]
ModelRow = Annotated[
    list[str] | None, typer.Option(help="NAME=DIR[+ADAPTER], a model of your own.")
]
EvalQuantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="nf4: hold weights in 4 bits.",
        autocompletion=lambda incomplete: choices("eval", "quantize")(incomplete),
    ),
]
WeightsMemory = Annotated[
    str | None,
    typer.Option(help="Memory for weights, such as 20GiB; more is read anew each pass."),
]
MultipleOf = Annotated[
    int | None,
    typer.Option(help="Round kept MLP channels up to a multiple: 64 suits GPUs. (default: 1)"),
]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time."
    ),
]
CrossEntropy = Annotated[
    str | None,
    typer.Option(help="chunked (never all logits at once) or full. (default: chunked)"),
]
Attention = Annotated[str | None, typer.Option(help="auto, sdpa, flash or eager. (default: auto)")]
Rank = Annotated[int | None, typer.Option("--rank", help="LoRA r. (default: 8)")]
Dropout = Annotated[float | None, typer.Option("--dropout", help="LoRA dropout. (default: 0.05)")]
# Of the training step whose memory is told or measured: nothing stands for auto here.
StepAttention = Annotated[
    str | None, typer.Option("--attention", help="sdpa, flash or eager. (default: sdpa)")
]
StepMicroBatch = Annotated[
    int | None,
    typer.Option("--micro-batch", help="Sequences per forward pass. (default: 4)"),
]
StepLength = Annotated[
    int | None, typer.Option("--length", help="Tokens per sequence. (default: 512)")
]
Optimizer = Annotated[
    str | None,
    typer.Option(help="adamw, or paged_adamw_8bit (GPU alone). (default: adamw)"),
]
ReportTo = Annotated[
    str | None,
    typer.Option(help="Also log the fit to: tensorboard, wandb (comma-separated)."),
]
Push = Annotated[
    str | None,
    typer.Option("--push", help="OWNER/NAME: upload the output to the hub (private when new)."),
]

if TYPE_CHECKING:
    from loram_cli.config.settings import Settings
    from loram_cli.stages.core.lifecycle import StageResult

DEFAULT_RUN = Path("loram-run")


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were given: everything but None and False."""
    return {
        name: value for name, value in flags.items() if value is not None and value is not False
    }


def layered(stage: str, **flags: Any) -> dict[str, Any]:
    """The flags that were given, over what environment and settings file set for the stage."""
    set_elsewhere = settings().section(stage)
    explicit = {name: value for name, value in flags.items() if value is not None}
    # Only --force is off unless given; a settings file cannot hold it.
    return {**set_elsewhere, **{k: v for k, v in explicit.items() if k != "force" or v}}


def comma_separated(text: str | None) -> tuple[str, ...] | None:
    """The words of ``a,b``; None stays None."""
    return None if text is None else tuple(w.strip() for w in text.split(",") if w.strip())


def settings() -> "Settings":
    """What the working directory's settings file and the environment set."""
    from loram_cli.config.settings import load_settings

    return load_settings(Path.cwd(), os.environ)


def choices(stage: str, name: str) -> Callable[[str], list[str]]:
    """Completion of an option by the values that its spec allows."""

    def complete(incomplete: str) -> list[str]:
        from loram_cli.config.recipe import setting_types

        return [
            word for word in _literals(setting_types(stage)[name]) if word.startswith(incomplete)
        ]

    return complete


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [word for arg in typing.get_args(hint) for word in _literals(arg)]


def settle(
    run: Path | None, model: str | None, reporter: Reporter, *, remember: bool = True
) -> tuple[RunDirectory, str]:
    """The run directory and its base model; says so when it is the demo base."""
    elsewhere = settings()
    if elsewhere.sources:
        reporter.note(f"settings from {', '.join(elsewhere.sources)}")
    directory = RunDirectory(run or elsewhere.run or DEFAULT_RUN)
    model = model or elsewhere.model
    first = directory.remembered_model() is None
    name = directory.settle_model(model, remember=remember)
    if name == DEMO_MODEL and first and model is None:
        reporter.note("no --model: using the embedded demo base")
    return directory, name


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


def tell_defaults(model: str, stage: str, values: dict[str, Any], reporter: Reporter) -> None:
    """Print the settings that come from the demo base's own recipe."""
    from loram_cli.config.defaults import stage_defaults

    defaults = {k: v for k, v in stage_defaults(model, stage, values).items() if k not in values}
    if defaults:
        words = " ".join(f"{k.replace('_', '-')}={_word(v)}" for k, v in defaults.items())
        reporter.note(f"defaults of the demo base's recipe: {words}")


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def reporter_for(json_output: bool) -> Reporter:
    """The reporter of a command; it draws on stderr, and with ``--json`` tells no notes.

    Of several processes on one command only the first one speaks.
    """
    if not is_main_process():
        return NullReporter()
    from loram_cli.cli.draw.console import ConsoleReporter

    return ConsoleReporter(quiet_notes=json_output)
