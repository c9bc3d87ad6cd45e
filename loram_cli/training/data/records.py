"""Reads data sets as records: files, folders, the demo's own sets, and the hub."""

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
from loram_cli.training.data.files import (
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    has_suffix,
    is_text_file,
    kind_at,
    require_regular,
)
from loram_cli.training.data.json_text import json_file_records, json_line_records, kind_of
from loram_cli.training.data.tables import arrow_records, csv_records, parquet_records

DEMO_PREFIX = "demo:"
_HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[^@]+))?")
_FORMATS = (
    "a .txt, .jsonl, .json, .csv, .tsv (each also .gz), .parquet or .arrow file, a folder of "
    "those, or a hub data set id"
)
# No data set has more; the root of a disk does.
_MOST_FILES = 100_000
# What tools write beside data: of datasets, and LLaMA-Factory's list of data sets.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HELD_OUT = re.compile(r"(^|[/._-])(test|validation|valid|val|dev|eval|evaluation)([/._-]|$)")


@dataclass(frozen=True)
class Record:
    """One record and the place it came from, for errors."""

    fields: Mapping[str, Any]
    where: str


def local_files(source: str) -> list[Path] | None:
    """The files behind a local source, or None when it names a hub data set.

    Raises:
        LoramError: It can only be a local path, and is not there, holds no data file, too many or
            files of several splits, or is a pipe or a device; or no hub data set has such a name.
    """
    kind = kind_at(Path(source))
    path = Path(source) if kind is None else Path(source).expanduser()
    require_regular(path)
    if kind == "file":
        if not has_suffix(path, RECORD_SUFFIXES + TEXT_SUFFIXES):
            raise LoramError(f"{source}: unknown kind of data file", f"expected {_FORMATS}")
        return [path]
    if kind == "folder":
        return _files_of(path, source)
    local_look = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if local_look or has_suffix(path, RECORD_SUFFIXES + TEXT_SUFFIXES):
        raise LoramError(f"{source}: no such file or folder", f"expected {_FORMATS}")
    _hub_match(source)
    return None


def _files_of(folder: Path, source: str) -> list[Path]:
    """The data files of a folder, all of one split; hidden ones and descriptions are no data."""
    entries = sorted(islice(folder.rglob("*"), _MOST_FILES + 1))
    if len(entries) > _MOST_FILES:
        raise LoramError(
            f"{source}: the folder holds more than {_MOST_FILES:,} files",
            "name the data files, or a folder of these",
        )
    named = {
        file: file.relative_to(folder).as_posix().lower()
        for file in entries
        if file.is_file()
        and has_suffix(file, RECORD_SUFFIXES + TEXT_SUFFIXES)
        and file.name not in _NO_DATA
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }
    if not named:
        raise LoramError(f"{source}: the folder holds no data file", f"expected {_FORMATS}")
    held_out = [file for file, name in named.items() if _HELD_OUT.search(name)]
    if 0 < len(held_out) < len(named):
        other = next(file for file in named if file not in held_out)
        raise LoramError(
            f"{source}: the folder holds several splits, such as "
            f"{held_out[0].relative_to(folder)} beside {other.relative_to(folder)}",
            f"name the files, by commas: {other}",
        )
    return list(named)


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


def _demo_records(source: str) -> Iterator[Record]:
    try:
        loaded = load_demo(source.removeprefix(DEMO_PREFIX))
    except ValueError as error:
        raise UsageError(str(error)) from None
    for number, fields in enumerate(loaded, 1):
        yield Record(fields, f"{source}, record {number}")


def _file_records(path: Path) -> Iterator[Record]:
    if is_text_file(path):
        raise LoramError(
            f"{path}: plain text where records are expected",
            "instruction data is .jsonl, .json, .csv, .tsv, .parquet or .arrow",
        )
    if has_suffix(path, (".parquet",)):
        found: Iterator[tuple[Any, str]] = parquet_records(path)
    elif has_suffix(path, (".arrow",)):
        found = arrow_records(path)
    elif has_suffix(path, (".csv", ".csv.gz", ".tsv", ".tsv.gz")):
        found = csv_records(path)
    elif has_suffix(path, (".json", ".json.gz")):
        found = json_file_records(path)
    else:
        found = json_line_records(path)
    for value, where in found:
        if not isinstance(value, dict):
            raise LoramError(f"{where}: expected an object with named fields, not {kind_of(value)}")
        yield Record(value, where)


def _hub_match(source: str) -> re.Match[str]:
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise LoramError(f"{source}: neither a file nor a hub data set id", f"expected {_FORMATS}")
    return match


def _hub_records(source: str, *, streaming: bool) -> Iterator[Record]:
    match = _hub_match(source)
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
                    f"check the name and the network, or pass a local file; expected {_FORMATS}",
                ) from error
            raise LoramError(
                f"{source}: not a local file, and the hub did not give it ({_first_line(error)})",
                "check the id (owner/name[:config][@split]), or pass a local file",
            ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
