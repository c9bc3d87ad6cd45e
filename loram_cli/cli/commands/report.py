"""``loram report``."""

from dataclasses import dataclass
from pathlib import Path

import typer

from loram_cli.cli.options import DEFAULT_RUN, Values, settings
from loram_cli.schema import Spec, setting

NAME = "report"
EPILOG = "Example: loram report --run loram-run --out report.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Spec):
    """Of which run, and where to."""

    run: Path | None = setting(
        None, env="LORAM_RUN", help="Run directory.", default_text=str(DEFAULT_RUN)
    )
    out: Path | None = setting(None, help="The file.", default_text="report.html in the run")


SPEC, OPTIONS = None, ReportOptions


def command(values: Values, options: ReportOptions) -> None:
    """Write a run as one HTML page: scores, loss curves, widths, specs; nothing to load."""
    from loram_cli.tools.html_page import PAGE_NAME, write_page

    directory = options.run or settings().run or DEFAULT_RUN
    file = options.out or directory / PAGE_NAME
    write_page(directory, file)
    typer.echo(f"wrote {file}")
