"""``loram generate``."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loram_cli.cli.commands.evaluate import ROW_HELP, ROWS_HELP
from loram_cli.cli.options import (
    BaseOptions,
    Values,
    comma_separated,
    layered,
    model_at_hand,
    reporter_for,
    settle,
)
from loram_cli.reading import read_stdin
from loram_cli.reporting import Reporter
from loram_cli.schema import setting
from loram_cli.stages.evaluate.spec import GenerateSpec

if TYPE_CHECKING:
    from loram_cli.config.defaults import Place

RowChooser = Callable[..., Any]

NAME = "generate"
EPILOG = 'Example: loram generate --rows base,recovered "How many legs do 3 cats have?"'


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(BaseOptions):
    """Whom to ask."""

    rows: str | None = setting(None, help=ROWS_HELP, default_text="polished, or recovered")
    row: tuple[str, ...] = setting((), help=ROW_HELP, repeat=True)


@dataclass(frozen=True, kw_only=True)
class TalkOptions(GenerateOptions):
    """Whom to talk to: of chat and serve."""

    rows: str | None = setting(None, help=ROWS_HELP, default_text="recovered,base")


def with_rows(
    options: GenerateOptions, values: Values, reporter: Reporter, choose: RowChooser
) -> "tuple[Place, Values]":
    """Where a command works, and its values with the rows that it is about.

    Args:
        options: Name them.
        values: Of the command's spec.
        reporter: Told of the demo base.
        choose: Which rows are meant where none is named.
    """
    from loram_cli.config.defaults import model_dir
    from loram_cli.config.rows import parse_rows, run_rows

    own = parse_rows(options.row)
    place = settle(options, reporter, at_hand=model_at_hand(options, own))
    rows = run_rows(place.run, model_dir(place.model))
    return place, {**values, "rows": choose(rows, comma_separated(options.rows), own)}


SPEC, OPTIONS = GenerateSpec, GenerateOptions


def command(values: Values, options: GenerateOptions) -> None:
    """Ask the full model with the recovered adapter, whether or not the GPU holds it."""
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.config.defaults import generate_spec
    from loram_cli.config.rows import asked_rows
    from loram_cli.stages.evaluate import generate

    if not values.get("prompts") and sys.stdin is not None and not sys.stdin.isatty():
        values["prompts"] = (read_stdin(sys.stdin).rstrip("\n"),)
    values = layered(NAME, values)
    reporter = reporter_for(options.json_output)
    spec = generate_spec(*with_rows(options, values, reporter, asked_rows))
    answers = generate.run(spec, reporter)
    if options.json_output:
        print_json({"answers": [answer.to_mapping() for answer in answers]})
        return
    console = stdout_console()
    for answer in answers:
        if len(answers) > 1:
            heading = answer.row if len(spec.prompts) == 1 else f"{answer.row}: {answer.prompt}"
            console.rule(heading, align="left", style="dim")
        console.print(answer.text)
