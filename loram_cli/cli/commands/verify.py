"""``loram verify``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "verify"
EPILOG = "Example: loram verify loram-run/recovered"


def command(
    directory: Annotated[
        Path, typer.Argument(help="An output, a run directory, a model or an adapter.")
    ],
    values: Annotated[
        bool, typer.Option("--values", help="Also read every weight: no NaN, no infinity.")
    ] = False,
    ancestry: Annotated[
        bool, typer.Option(help="Follow inputs to the directories that they name.")
    ] = True,
    json_output: options.Json = False,
) -> None:
    """Check files, shapes and ancestry of a directory against what was recorded."""
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.tools import verify

    spec = verify.VerifySpec(directory=directory, values=values, ancestry=ancestry)
    report = verify.run(spec, options.reporter_for(json_output))
    if json_output:
        print_json(report.to_mapping())
    else:
        console = stdout_console()
        for note in report.notes:
            console.print(f"note: {note}")
        for problem in report.problems:
            console.print(f"problem: {problem}")
        checked, wrong = len(report.directories), len(report.problems)
        console.print(
            f"{checked} director{'y' if checked == 1 else 'ies'} checked, "
            f"{wrong or 'no'} problem{'' if wrong == 1 else 's'}"
        )
    if report.problems:
        raise typer.Exit(1)
