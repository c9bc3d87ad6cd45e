"""Outputs that are one file: whole, or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loram_cli.errors import LoramError, UsageError


@contextmanager
def whole_file(out: Path, *, replace: bool = False) -> Iterator[BinaryIO]:
    """Fill a file under a temporary name; it gets its own name when it is whole, or is removed.

    Args:
        out: The file.
        replace: Take the place of an existing one, see :func:`refuse_existing`.

    Raises:
        UsageError: It exists, and not ``replace``.
        LoramError: It cannot be written.
    """
    if not replace:
        refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not out.is_file():
            # A pipe or a device has no other name.
            with out.open("wb") as file:
                yield file
            return
        # Of a killed export; and what a link in its place points to is not ours to empty.
        partial.unlink(missing_ok=True)
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise LoramError(
            f"{out}: cannot write ({error.strerror})", "free some space, or pass another --out"
        ) from error


def refuse_existing(out: Path, *, force: bool = False, is_ours: bool = False) -> None:
    """Raise if an output is there already.

    Args:
        out: A file or a directory.
        force: Whether one of ours may be replaced.
        is_ours: Whether loram wrote it.

    Raises:
        UsageError: It exists, and either not ``force`` or somebody else wrote it.
    """
    if not out.exists():
        return
    if not is_ours:
        raise UsageError(
            f"{out}: exists and is not an output of loram",
            "pass another --out; --force replaces loram's own outputs only",
        )
    if not force:
        raise UsageError(f"{out}: exists", "pass --force to replace it, or another --out")
