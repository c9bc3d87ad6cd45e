"""Which checkpoints of an interrupted run are whole, and whether they belong to this run."""

import json
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")
_WHOLE = "whole"
_RUN = "run.json"


def mark_whole(checkpoint: Path) -> None:
    """State that every file of a checkpoint is written. The trainer's own files do not tell."""
    (checkpoint / _WHOLE).touch()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the trainer puts the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def newest_checkpoint(folder: Path, fingerprint: str) -> tuple[Path, int] | None:
    """The checkpoint to resume from, after clearing what cannot be used.

    Args:
        folder: Where checkpoints are kept; made if absent.
        fingerprint: Of settings, data and parameters; checkpoints of another run are removed.

    Returns:
        The newest whole checkpoint and its step, or None to start from nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    same_run = _fingerprint_of(folder) == fingerprint
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        if same_run and (path / _WHOLE).is_file():
            found[int(match[1])] = path
        else:
            shutil.rmtree(path)
    if not same_run:
        (folder / _RUN).write_text(json.dumps({"fingerprint": fingerprint}) + "\n", "utf-8")
    if not found:
        return None
    step = max(found)
    return found[step], step


def _fingerprint_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / _RUN).read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
