"""``loram report``."""

from pathlib import Path
from typing import Annotated

import typer

from loram_cli.cli import options

NAME = "report"
EPILOG = "Example: loram report --run loram-run --out report.html"


def command(
    run: options.Run = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file. (default: report.html in the run)")
    ] = None,
) -> None:
    """Write a run as one HTML page: scores, loss curves, widths, specs; nothing to load."""
    from loram_cli.tools.html_page import PAGE_NAME, write_page

    directory = run or options.settings().run or options.DEFAULT_RUN
    file = out or directory / PAGE_NAME
    write_page(directory, file)
    typer.echo(f"wrote {file}")
