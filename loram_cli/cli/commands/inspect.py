"""``loram inspect``."""

from dataclasses import dataclass
from pathlib import Path

from loram_cli.cli.options import JsonOption, Values
from loram_cli.schema import setting

NAME = "inspect"
EPILOG = "Example: loram inspect loram-run/pruned"


@dataclass(frozen=True, kw_only=True)
class InspectOptions(JsonOption):
    """What to look at."""

    directory: Path = setting(
        help="An output, a run directory, a model or an adapter.", argument=True
    )


SPEC, OPTIONS = None, InspectOptions


def command(values: Values, options: InspectOptions) -> None:
    """Show what a directory is: stage, base, widths per layer, spec and results."""
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.cli.draw.inspection import lines
    from loram_cli.tools.inspect import inspect

    found = inspect(options.directory)
    if options.json_output:
        print_json(found.to_mapping())
        return
    console = stdout_console()
    for line in lines(found):
        console.print(line)
