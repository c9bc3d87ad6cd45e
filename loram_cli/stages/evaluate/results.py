"""The files that an evaluation leaves: results, tables, a picture."""

import json
from pathlib import Path

from loram_cli.checkpoint.index import read_json
from loram_cli.errors import LoramError, reason_of
from loram_cli.evaluation.comparison import to_csv, to_markdown
from loram_cli.evaluation.plot import draw_comparison
from loram_cli.evaluation.results import EvalResult
from loram_cli.runs.digests import file_digest
from loram_cli.runs.manifest import claims
from loram_cli.schema import NOT_REVIVED, plain, revived

RESULTS_NAME = "results.json"
PLOT_NAME = "results.png"
_REMEDY = "was it changed? 'loram eval --force' makes it once more"


def write_results(result: EvalResult, path: Path) -> None:
    """Write the comparison as JSON, Markdown, CSV and a picture."""
    (path / RESULTS_NAME).write_text(json.dumps(plain(result), indent=1) + "\n", "utf-8")
    (path / "results.md").write_text(to_markdown(result), "utf-8")
    (path / "results.csv").write_text(to_csv(result), "utf-8")
    draw_comparison(result, path / PLOT_NAME)


def read_results(directory: Path) -> EvalResult:
    """The comparison of a finished evaluation, its rows in their order.

    Raises:
        LoramError: It is not there, not readable, or not the one that was recorded.
    """
    file = directory / RESULTS_NAME
    recorded = (claims(directory) or {}).get(RESULTS_NAME)
    try:
        if recorded is not None and file_digest(file) != f"sha256:{recorded['sha256']}":
            raise LoramError(f"{file}: is not the file that 'eval' wrote", _REMEDY)
        found: EvalResult = revived(EvalResult, read_json(file))
    except NOT_REVIVED as error:
        raise LoramError(
            f"{file}: no results of an evaluation ({type(error).__name__}: {reason_of(error)})",
            _REMEDY,
        ) from error
    return found
