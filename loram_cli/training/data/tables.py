"""Tables as records: CSV, TSV, Parquet and Arrow."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.training.data.files import LONGEST_RECORD, has_suffix, read_lines, require_regular

_ROWS_AT_A_TIME = 256
_ARROW_FILE = b"ARROW1"


def csv_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a CSV or TSV file whose first row names the fields; an empty cell is no value.

    Raises:
        LoramError: A row has more cells than the first, or cannot be read; names the line.
    """
    delimiter = "\t" if has_suffix(path, (".tsv", ".tsv.gz")) else _delimiter(path)
    previous = csv.field_size_limit(LONGEST_RECORD)
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    line = 1
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise LoramError(f"{path}, line 1: two columns of the same name")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(names):
                raise LoramError(
                    f"{path}, line {line}: {len(cells)} cells, and the first row names "
                    f"{len(names)} columns"
                )
            if cells:
                padded = [*cells, *[""] * (len(names) - len(cells))]
                fields = {n: cell or None for n, cell in zip(names, padded, strict=True)}
                yield fields, f"{path}, line {line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise LoramError(f"{path}, line {line}: not a readable table ({error})") from error
    finally:
        csv.field_size_limit(previous)


def _delimiter(path: Path) -> str:
    """A semicolon where the first row has that and no comma, as some languages' Excel writes it."""
    first = next((line for _, line in read_lines(path)), "")
    return ";" if ";" in first and "," not in first else ","


def parquet_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a Parquet file.

    Raises:
        LoramError: It is not one, or a text in it is not UTF-8.
    """
    import pyarrow.parquet

    require_regular(path)

    def batches() -> Iterator[Any]:
        # A piece at a time, and no memory map: a file on a network may go away.
        file = pyarrow.parquet.ParquetFile(path)
        yield from file.iter_batches(batch_size=_ROWS_AT_A_TIME)

    yield from _rows(path, batches(), "parquet")


def arrow_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of an Arrow file, as ``datasets`` saves them (a stream), or with a footer (Feather).

    Raises:
        LoramError: It is not one, or a text in it is not UTF-8.
    """
    import pyarrow.ipc

    require_regular(path)

    def batches() -> Iterator[Any]:
        with path.open("rb") as file:
            whole = file.read(len(_ARROW_FILE)) == _ARROW_FILE
            file.seek(0)
            if whole:
                reader = pyarrow.ipc.open_file(file)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(file)

    yield from _rows(path, batches(), "arrow")


def _rows(path: Path, batches: Iterator[Any], kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of record batches with their places; what goes wrong is an error of the file."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                for fields in batch.slice(start, _ROWS_AT_A_TIME).to_pylist():
                    number += 1
                    yield fields, f"{path}, row {number}"
    except UnicodeDecodeError as error:
        raise LoramError(f"{path}: text after row {number} is not UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise LoramError(f"{path}: not a readable {kind} file ({text[0][:160]})") from error
