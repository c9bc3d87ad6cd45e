"""Digests of files."""

import hashlib
from pathlib import Path

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
