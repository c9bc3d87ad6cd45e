"""Which checkpoints of an interrupted run are whole, and whether they belong to this run."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram_cli.schema import digest_of, spec_to_mapping
from loram_cli.training.loop.options import FitOptions

_NAME = re.compile(r"checkpoint-(\d+)")
_WHOLE = "whole"
_RUN = "run.json"


def mark_whole(checkpoint: Path) -> None:
    """State that every file of a checkpoint is written. The trainer's own files do not tell."""
    (checkpoint / _WHOLE).touch()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the trainer puts the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


@dataclass(frozen=True)
class Found:
    """What an earlier start left behind.

    Attributes:
        path: The checkpoint to resume from; None to start from nothing.
        step: Its step; 0 without one.
        differs: Where there were checkpoints that cannot be resumed, what of their run is
            not as it is now; ``("unknown",)`` where that cannot be told.
    """

    path: Path | None = None
    step: int = 0
    differs: tuple[str, ...] = ()

    def begins_anew(self, shared: bool) -> str:
        """Why what is there is of no use.

        Args:
            shared: Whether this run's model is shared out among processes.
        """
        if "fsdp" in self.differs:
            theirs, mine = ("without --fsdp", "with it") if shared else ("with --fsdp", "without")
            return f"the checkpoints were written {theirs}, and this runs {mine}: starting over"
        if "unknown" in self.differs:
            return "the checkpoints here do not say of which run they are: starting over"
        return f"the checkpoints here are of other {' and '.join(self.differs)}: starting over"


def fingerprint(
    options: FitOptions,
    precision: str,
    data: str,
    trainable: Mapping[str, tuple[int, ...]],
    shared: bool,
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be resumed, by name.

    The number of processes is not in it: they share a batch, and what it teaches stays the same.

    Args:
        options: Of the fit.
        precision: ``fp32`` or ``bf16``.
        data: Digest of data and objective.
        trainable: Shapes of the trained parameters.
        shared: Whether the model is shared out: a checkpoint of slices is another set of files.
    """
    # How often a checkpoint is written, and who else hears of it, changes nothing in the result.
    plain = spec_to_mapping(replace(options, checkpoint_steps=1, report_to=()))
    shapes = {name: list(shape) for name, shape in trainable.items()}
    return {
        "settings": digest_of(plain),
        "precision": precision,
        "data": data,
        "trained weights": digest_of(shapes),
        "fsdp": shared,
    }


def newest_checkpoint(folder: Path, fingerprint: Mapping[str, Any]) -> Found:
    """The checkpoint to resume from, after clearing what cannot be used.

    Args:
        folder: Where checkpoints are kept; made if absent.
        fingerprint: Of settings, data and parameters, by name, as JSON has them; checkpoints of
            another run are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    theirs = _fingerprint_of(folder)
    same_run = theirs == fingerprint
    usable: dict[int, Path] = {}
    lost = False
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        whole = (path / _WHOLE).is_file()
        if same_run and whole:
            usable[int(match[1])] = path
        else:
            lost |= whole
            shutil.rmtree(path)
    if not same_run:
        (folder / _RUN).write_text(json.dumps({"fingerprint": fingerprint}) + "\n", "utf-8")
        names = [name for name, value in fingerprint.items() if theirs.get(name, value) != value]
        return Found(differs=tuple(names) or ("unknown",)) if lost else Found()
    if not usable:
        return Found()
    step = max(usable)
    return Found(usable[step], step)


def _fingerprint_of(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _RUN).read_text("utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
