"""The files that an evaluation leaves: results, tables, a picture."""

import json
from pathlib import Path

from loram_cli.checkpoint.index import read_json
from loram_cli.evaluation.comparison import to_csv, to_markdown
from loram_cli.evaluation.plot import draw_comparison
from loram_cli.evaluation.results import EvalResult
from loram_cli.schema import plain, revived

RESULTS_NAME = "results.json"
PLOT_NAME = "results.png"


def write_results(result: EvalResult, path: Path) -> None:
    """Write the comparison as JSON, Markdown, CSV and a picture."""
    (path / RESULTS_NAME).write_text(json.dumps(plain(result), indent=1) + "\n", "utf-8")
    (path / "results.md").write_text(to_markdown(result), "utf-8")
    (path / "results.csv").write_text(to_csv(result), "utf-8")
    draw_comparison(result, path / PLOT_NAME)


def read_results(directory: Path) -> EvalResult:
    """The comparison of a finished evaluation, its rows in their order.

    Raises:
        LoramError: It is not there, or not readable.
    """
    found: EvalResult = revived(EvalResult, read_json(directory / RESULTS_NAME))
    return found
