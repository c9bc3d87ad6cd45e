"""Rows of models: those that a run has made, and the user's own."""

from collections.abc import Sequence
from pathlib import Path

from loram_cli.errors import UsageError
from loram_cli.lora.adapter import CONFIG_NAME
from loram_cli.runs.manifest import MANIFEST_NAME
from loram_cli.runs.rundir import RunDirectory
from loram_cli.schema import unknown_name
from loram_cli.stages.evaluate.spec import Rows

FULL_LORA = "full-lora"


def run_rows(run: RunDirectory, base: Path) -> Rows:
    """Rows of a comparison: base, pruned as it is, recovered, merged, and full LoRA."""
    rows: Rows = {"base": (base,)}
    if run.is_done("prune"):
        rows["pruned"] = (run.output("prune"),)
    if run.is_done("recover"):
        rows["recovered"] = (base, run.output("recover"))
    if run.is_done("merge"):
        rows["merged"] = (run.output("merge"),)
    if (run.path / FULL_LORA / MANIFEST_NAME).is_file():
        rows[FULL_LORA] = (base, run.path / FULL_LORA)
    return rows


def chosen_rows(rows: Rows, choose: Sequence[str] | None, own: Rows) -> Rows:
    """The rows that were named, in their order, and the user's own; all without names.

    Raises:
        UsageError: A named row does not exist.
    """
    known = {**rows, **own}
    for name in choose or ():
        if name not in known:
            raise unknown_name("row", name, known, "--rows")
    if choose is None:
        return known
    return {name: known[name] for name in dict.fromkeys([*choose, *own])}


def asked_rows(rows: Rows, choose: Sequence[str] | None, own: Rows) -> Rows:
    """The rows to ask a prompt: the recovered model unless named, or the base before there is one.

    Raises:
        UsageError: A named row does not exist.
    """
    if choose is None:
        choose = () if own else ("recovered" if "recovered" in rows else "base",)
    return chosen_rows(rows, choose, own)


def served_rows(rows: Rows, choose: Sequence[str] | None, own: Rows) -> Rows:
    """The rows to talk to: base and recovered unless named, which share the base's weights.

    Raises:
        UsageError: A named row does not exist.
    """
    if choose is None:
        choose = () if own else tuple(name for name in ("recovered", "base") if name in rows)
    return chosen_rows(rows, choose, own)


def parse_rows(entries: Sequence[str]) -> Rows:
    """``NAME=DIR`` or ``NAME=DIR+ADAPTER``.

    Raises:
        UsageError: One is not of that form, or a directory is not there.
    """
    rows = {}
    for entry in entries:
        name, _, place = entry.partition("=")
        if not name or not place:
            raise UsageError(f"--row {entry}: expected NAME=DIR or NAME=DIR+ADAPTER")
        parts = [Path(place)]
        if not parts[0].is_dir() and "+" in place:
            parts = [Path(part) for part in place.rsplit("+", 1)]
        for part, file in zip(parts, ("config.json", CONFIG_NAME), strict=False):
            if not (part / file).is_file():
                raise UsageError(f"--row {entry}: {part} has no {file}")
        rows[name] = tuple(parts)
    return rows
