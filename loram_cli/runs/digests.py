"""Digests of files and of whole directories."""

import hashlib
import os
from collections.abc import Mapping, Sequence
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


def file_digests(files: Sequence[Path]) -> list[str]:
    """As :func:`file_digest`, of several files side by side: hashing lets go of Python's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_digest, files))


def file_records(
    root: Path, *, leave_out: tuple[str, ...] = (), known: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of every file below a directory, by relative path.

    Args:
        root: The directory.
        leave_out: Names of files and folders right below it that are not recorded.
        known: SHA-256 in hex by relative path, of files hashed while they were written.
    """
    files = {
        file.relative_to(root).as_posix(): file
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }
    files = {n: file for n, file in files.items() if n.partition("/")[0] not in leave_out}
    digests = {name: digest for name, digest in (known or {}).items() if name in files}
    unknown = [name for name in files if name not in digests]
    found = file_digests([files[name] for name in unknown])
    digests |= {n: d.removeprefix("sha256:") for n, d in zip(unknown, found, strict=True)}
    return {
        name: {"bytes": file.stat().st_size, "sha256": digests[name]}
        for name, file in files.items()
    }
