"""What ``prune --fit-memory`` chooses by: the bench's results, as the product's data file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gain.report import Figures, merged
from gain.rows import ROWS, Flags
from loram_cli.schema import from_text, hints_of
from loram_cli.stages.prune.spec import PruneSpec

# What depends on the user's data, not on the way.
_NOT_THE_WAY = ("calibration", "calibration_samples", "calibration_length")
# Shares nearer than this are the same, by what another seed changes.
_NOISE = 0.01


def write_frontier(done: Mapping[str, Figures], base: str, file: Path) -> None:
    """Write every way that one ``prune`` makes, with what it kept.

    Of rows that hold the same bytes, a later one must have kept more than those before it, which
    are made in less time.

    Args:
        done: Figures by row and seed.
        base: Name of the model that was measured.
        file: To write.
    """
    rows = {row.name: row for row in ROWS}
    points = []
    for entry in merged(done):
        row = rows[entry["name"]]
        # Two prunings, one after the other, are more than one command can choose.
        if row.then or not row.choosable:
            continue
        alike = [p["kept"] for p in points if p["bytes"] == round(entry["bytes"], 4)]
        if alike and entry["kept"] < max(alike) + _NOISE:
            continue
        align, train = row.align or (), row.train
        points.append(
            {
                "name": row.name,
                "prune": _settings(row.prune or ()),
                "align": align[align.index("--method") + 1] if align else None,
                "quantize": train[train.index("--quantize") + 1] if "--quantize" in train else None,
                "fit_scale": "loss_scaled" in entry,
                "bytes": round(entry["bytes"], 4),
                "kept": round(entry["kept"], 5),
                "seeds": entry["seeds"],
            }
        )
    text = json.dumps({"base": base, "points": points}, indent=1)
    file.write_text(text + "\n", "utf-8")


def _settings(flags: Flags) -> dict[str, Any]:
    """Settings of ``prune`` from its flags."""
    hints = hints_of(PruneSpec)
    pairs = zip(flags[::2], flags[1::2], strict=True)
    names = {flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs}
    return {
        name: from_text(hints[name], value)
        for name, value in names.items()
        if name not in _NOT_THE_WAY
    }
