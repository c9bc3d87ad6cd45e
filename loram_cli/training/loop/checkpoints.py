"""Which checkpoints of an interrupted run are whole, and whether they belong to this run."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram_cli.runs.whole import damage, is_marked
from loram_cli.schema import digest_of, spec_to_mapping
from loram_cli.training.loop.options import FitOptions
from loram_cli.units import whole_number

_NAME = re.compile(r"checkpoint-(\d+)")
_RUN = "run.json"
# Adapters of all checkpoints, those that are gone included.
_KEPT = "adapters"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the trainer puts the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def kept_path(folder: Path, step: int) -> Path:
    """Where the adapter of a step's checkpoint is kept."""
    return folder / _KEPT / str(step)


def kept_steps(folder: Path) -> list[int]:
    """The steps whose adapters are kept, in order."""
    kept = folder / _KEPT
    found = [whole_number(path.name) for path in kept.iterdir()] if kept.is_dir() else []
    return sorted(step for step in found if step is not None)


@dataclass(frozen=True)
class Found:
    """What an earlier start left behind.

    Attributes:
        path: The checkpoint to resume from; None to start from nothing.
        step: Its step; 0 without one.
        differs: Where there were checkpoints that cannot be resumed, what of their run is
            not as it is now; ``("unknown",)`` where that cannot be told.
        damaged: The checkpoints that are marked as whole and are not, newest first, in words.
    """

    path: Path | None = None
    step: int = 0
    differs: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    def warnings(self, shared: bool) -> list[str]:
        """Why what is there is of no use, a line each."""
        goes_on = "using the one before" if self.path else "starting over"
        lines = [f"{what}: {goes_on}" for what in self.damaged]
        if "fsdp" in self.differs:
            theirs, mine = ("without --fsdp", "with it") if shared else ("with --fsdp", "without")
            lines.append(
                f"the checkpoints were written {theirs}, and this runs {mine}: starting over"
            )
        elif "unknown" in self.differs:
            lines.append("the checkpoints here do not say of which run they are: starting over")
        elif self.differs:
            other = " and ".join(self.differs)
            lines.append(f"the checkpoints here are of other {other}: starting over")
        return lines


def fingerprint(
    options: FitOptions,
    precision: str,
    data: str,
    trainable: Mapping[str, tuple[int, ...]],
    shared: bool,
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be resumed, by name.

    The number of processes is not in it: they share a batch, and what it teaches stays the same.

    A checkpoint of slices (``shared``) is another set of files.
    """
    # How often a checkpoint is written, and who else hears of it, changes nothing in the result.
    plain = spec_to_mapping(
        replace(options, checkpoint_steps=1, report_to=(), keep_checkpoints=None)
    )
    # Neither does how layers are run, but for rounding.
    del plain["compile_layers"]
    shapes = {name: list(shape) for name, shape in trainable.items()}
    return {
        "settings": digest_of(plain),
        "precision": precision,
        "data": data,
        "trained weights": digest_of(shapes),
        "fsdp": shared,
    }


def newest_checkpoint(folder: Path, fingerprint: Mapping[str, Any]) -> Found:
    """The newest checkpoint that is whole, after removing those that cannot be used.

    The folder is made if absent. Checkpoints of a run with another fingerprint go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    theirs = _fingerprint_of(folder)
    there = {
        int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
    }
    if theirs != fingerprint:
        marked = [path for path in there.values() if is_marked(path)]
        for path in there.values():
            shutil.rmtree(path)
        shutil.rmtree(folder / _KEPT, ignore_errors=True)
        (folder / _RUN).write_text(json.dumps({"fingerprint": fingerprint}) + "\n", "utf-8")
        names = [name for name, value in fingerprint.items() if theirs.get(name, value) != value]
        return Found(differs=tuple(names) or ("unknown",)) if marked else Found()
    damaged: list[str] = []
    for step in sorted(there, reverse=True):
        wrong = damage(there[step])
        if wrong is None:
            return Found(there[step], step, damaged=tuple(damaged))
        # One without its mark was cut short by a kill, which is no news.
        if is_marked(there[step]):
            damaged.append(f"{there[step]}: damaged, {wrong}")
        shutil.rmtree(there[step])
    return Found(damaged=tuple(damaged))


def newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint that was written to its end; 0 where there is none."""
    steps = (int(m[1]) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and is_marked(p))
    return max(steps, default=0)


def _fingerprint_of(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _RUN).read_text("utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
