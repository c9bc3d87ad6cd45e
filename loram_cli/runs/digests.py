"""Digests of files and of whole directories."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, as ``sha256:<hex>``.

    Raises:
        LoramError: The file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise LoramError(f"{file}: cannot be read ({error.strerror})") from error


def file_records(root: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of every file below a directory, by relative path.

    Files are read side by side: hashing lets go of Python's lock, and right after writing the
    bytes are still in memory.

    Args:
        root: The directory.
        leave_out: Relative paths that are not recorded.
    """
    files = {
        file.relative_to(root).as_posix(): file
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }
    files = {name: file for name, file in files.items() if name not in leave_out}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_digest, files.values()))
    return {
        name: {"bytes": file.stat().st_size, "sha256": digest.removeprefix("sha256:")}
        for (name, file), digest in zip(files.items(), digests, strict=True)
    }
