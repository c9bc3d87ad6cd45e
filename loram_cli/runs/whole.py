"""Folders of unfinished work: whether one is whole, and still what was written."""

import json
from pathlib import Path

from loram_cli.runs.digests import file_records
from loram_cli.runs.staging import sync, sync_tree

MARK_NAME = "whole"


def mark_whole(folder: Path) -> None:
    """State that every file of a folder is written and on the disk, with their digests."""
    records = file_records(folder, leave_out=(MARK_NAME,))
    sync_tree(folder)
    partial = folder / f"{MARK_NAME}.partial"
    partial.write_text(json.dumps(records), "utf-8")
    sync(partial)
    partial.rename(folder / MARK_NAME)
    sync(folder)


def is_marked(folder: Path) -> bool:
    """Whether all of it had been written, whatever happened to it since."""
    return (folder / MARK_NAME).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with a folder; None where its files are those that were marked."""
    if not is_marked(folder):
        return "it was not written whole"
    try:
        marked = dict(json.loads((folder / MARK_NAME).read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return f"{MARK_NAME} cannot be read"
    found = file_records(folder, leave_out=(MARK_NAME,))
    for name in sorted({*marked, *found}):
        if name not in found:
            return f"{name} is missing"
        if marked.get(name) != found[name]:
            return f"{name} has changed"
    return None
