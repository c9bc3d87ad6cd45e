"""Data files as bytes and lines: regular files only, gzipped or not, in bounded memory."""

import codecs
import gzip
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from loram_cli.errors import LoramError

_PACKABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
RECORD_SUFFIXES = (*_PACKABLE, *(f"{suffix}.gz" for suffix in _PACKABLE), ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".txt.gz")
# No record of text is longer; a longer one is a file without line ends, or not data at all.
LONGEST_RECORD = 128 << 20
_PIECE = 1 << 20
_BROKEN = (OSError, EOFError, zlib.error)


def has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether the file's name ends in one of the suffixes, in either case."""
    return path.name.lower().endswith(suffixes)


def is_text_file(path: Path) -> bool:
    """Whether the file is plain text rather than records."""
    return has_suffix(path, TEXT_SUFFIXES)


def kind_at(path: Path) -> Literal["file", "folder", "other"] | None:
    """What stands at a path; None for nothing, a name that cannot be one included."""
    try:
        mode = path.expanduser().stat().st_mode
    except (OSError, ValueError, RuntimeError):
        # A name that is too long, holds a zero byte, or begins with an unknown ~user.
        return None
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def require_regular(path: Path) -> None:
    """Refuse what has no end, or may only be read once: a pipe, a device, a socket.

    Raises:
        LoramError: It is none of a regular file, a folder and a name that does not exist.
    """
    if kind_at(path) == "other":
        raise LoramError(f"{path}: not a regular file", "write the data to a file first")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Lines with their numbers from 1, split at ``\n`` only, line ends kept.

    Raises:
        LoramError: Unreadable, not UTF-8, or a line of more than ``LONGEST_RECORD`` bytes.
    """
    number = 0
    try:
        with _opened(path) as file:
            while raw := file.readline(LONGEST_RECORD + 1):
                number += 1
                if len(raw) > LONGEST_RECORD:
                    raise LoramError(
                        f"{path}, line {number}: longer than {LONGEST_RECORD >> 20} MiB",
                        "one record a line, each line ended by a line feed",
                    )
                # Only the file's first bytes may be a byte order mark.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from error
    except _BROKEN as error:
        raise LoramError(f"{path}: cannot be read after line {number} ({error})") from error


def read_pieces(path: Path) -> Iterator[str]:
    """A file's text, about a million characters at a time.

    Raises:
        LoramError: Unreadable, or not UTF-8; names the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    try:
        with _opened(path) as file:
            while raw := file.read(_PIECE):
                piece = decoder.decode(raw)
                line += piece.count("\n")
                yield piece
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise _not_utf8(path, line, error) from error
    except _BROKEN as error:
        raise LoramError(f"{path}: cannot be read after line {line} ({error})") from error


def read_text_file(path: Path) -> str:
    """A UTF-8 text file, gzipped or not.

    Raises:
        LoramError: Unreadable, or not UTF-8; names the line.
    """
    return "".join(read_pieces(path))


def _opened(path: Path) -> IO[bytes]:
    require_regular(path)
    # Binary modes of both give a reader of bytes.
    return gzip.open(path, "rb") if has_suffix(path, (".gz",)) else path.open("rb")  # type: ignore[return-value]


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> LoramError:
    return LoramError(
        f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})",
        "convert the file to UTF-8",
    )
