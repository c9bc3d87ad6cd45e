"""Reads data sets as records: files, folders, the demo's own sets, and the hub."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loram_cli.demo.problems import load_demo
from loram_cli.errors import LoramError, UsageError
from loram_cli.hub import offline_libraries, unreachable
from loram_cli.quiet import no_progress_bars, quiet_libraries

DEMO_PREFIX = "demo:"
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.gz")
_HUB_ID = re.compile(r"^(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[^@]+))?$")
_FORMATS = "a .txt, .jsonl(.gz), .json or .parquet file, a folder of those, or a hub data set id"


@dataclass(frozen=True)
class Record:
    """One record and the place it came from, for errors."""

    fields: Mapping[str, Any]
    where: str


def local_files(source: str) -> list[Path] | None:
    """The files behind a local source, or None when it names a hub data set.

    Raises:
        LoramError: It can only be a local path, and is not there or holds no data file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not _has_suffix(path, RECORD_SUFFIXES + TEXT_SUFFIXES):
            raise LoramError(f"{source}: unknown kind of data file", f"wanted: {_FORMATS}")
        return [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and _has_suffix(file, RECORD_SUFFIXES + TEXT_SUFFIXES)
        )
        if not files:
            raise LoramError(f"{source}: the folder holds no data file", f"wanted: {_FORMATS}")
        return files
    local_look = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if local_look or _has_suffix(path, RECORD_SUFFIXES + TEXT_SUFFIXES):
        raise LoramError(f"{source}: no such file or folder", f"wanted: {_FORMATS}")
    return None


def read_records(source: str, *, limit: int | None = None) -> Iterator[Record]:
    """Records of a source, in order.

    Args:
        source: ``demo:NAME``, a file, a folder, or a hub id ``owner/name[:config][@split]``.
        limit: Stop after so many; a hub data set is then streamed and not stored whole.

    Raises:
        LoramError: It cannot be read; names file and line.
    """
    if source.startswith(DEMO_PREFIX):
        records = _demo_records(source)
    elif (files := local_files(source)) is not None:
        records = (record for file in files for record in _file_records(file))
    else:
        records = _hub_records(source, streaming=limit is not None)
    return islice(records, limit)


def read_text_file(path: Path) -> str:
    """A UTF-8 text file, gzipped or not.

    Raises:
        LoramError: Unreadable, or not UTF-8; names the line.
    """
    return "".join(line for _, line in _lines(path))


def is_text_file(path: Path) -> bool:
    """Whether the file is plain text rather than records."""
    return _has_suffix(path, TEXT_SUFFIXES)


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _demo_records(source: str) -> Iterator[Record]:
    try:
        loaded = load_demo(source.removeprefix(DEMO_PREFIX))
    except ValueError as error:
        raise UsageError(str(error)) from None
    for number, fields in enumerate(loaded, 1):
        yield Record(fields, f"{source}, record {number}")


def _file_records(path: Path) -> Iterator[Record]:
    if _has_suffix(path, (".parquet",)):
        yield from _parquet_records(path)
    elif _has_suffix(path, (".json", ".json.gz")):
        yield from _json_records(path)
    elif is_text_file(path):
        raise LoramError(
            f"{path}: plain text where records are wanted",
            "instruction data is .jsonl, .json or .parquet",
        )
    else:
        for number, line in _lines(path):
            if line.strip():
                yield _record(_parse(line, path, number), f"{path}, line {number}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else Path.open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                # Only the file's first bytes may be a byte order mark.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise LoramError(
            f"{path}, line {number}: not UTF-8 (byte {error.start} of the line is "
            f"0x{error.object[error.start]:02x})",
            "convert the file to UTF-8",
        ) from error
    except (OSError, EOFError) as error:
        raise LoramError(f"{path}: cannot be read after line {number} ({error})") from error


def _json_records(path: Path) -> Iterator[Record]:
    text = read_text_file(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        # Many files named .json hold one object a line.
        if error.msg == "Extra data":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield _record(_parse(line, path, number), f"{path}, line {number}")
            return
        raise _broken_json(path, error.lineno, error) from error
    except RecursionError as error:
        raise LoramError(f"{path}: JSON is nested too deeply") from error
    if not isinstance(data, list):
        raise LoramError(f"{path}: a list of records is wanted, not {_kind(data)}")
    for number, item in enumerate(data, 1):
        yield _record(item, f"{path}, record {number}")


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Record(fields, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise LoramError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _hub_records(source: str, *, streaming: bool) -> Iterator[Record]:
    match = _HUB_ID.match(source)
    if match is None:
        raise LoramError(f"{source}: neither a file nor a hub data set id", f"wanted: {_FORMATS}")
    split = match["split"] or "train"
    silence = unreachable()
    with (
        quiet_libraries(),
        offline_libraries(silence is not None),
        no_progress_bars("datasets"),
    ):
        import datasets

        try:
            rows = datasets.load_dataset(
                match["path"],
                match["config"],
                split=split,
                # What is in the cache is there whole, and only a download can be streamed.
                streaming=streaming and silence is None,
            )
            for number, fields in enumerate(rows, 1):
                yield Record(fields, f"{source}, {split} record {number}")
        except Exception as error:
            # The hub's libraries raise a different class for each way to fail.
            if silence is not None:
                raise LoramError(
                    f"{source}: not a local file, not in the hub's cache, and {silence}",
                    f"check the name and the network, or pass a local file; wanted: {_FORMATS}",
                ) from error
            raise LoramError(
                f"{source}: not a local file, and the hub did not give it ({_first_line(error)})",
                "check the id (owner/name[:config][@split]), or pass a local file",
            ) from error


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _broken_json(path, number, error) from error
    except RecursionError as error:
        raise LoramError(f"{path}, line {number}: JSON is nested too deeply") from error


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise LoramError(f"{where}: an object with named fields is wanted, not {_kind(value)}")
    return Record(value, where)


def _broken_json(path: Path, line: int, error: json.JSONDecodeError) -> LoramError:
    return LoramError(f"{path}, line {line}: broken JSON ({error.msg}, column {error.colno})")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
