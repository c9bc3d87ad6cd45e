"""Users' JSON: lists, lines and single objects, read record by record in bounded memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.training.data.files import LONGEST_RECORD, read_lines, read_pieces

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = " \t\r\n"
# A text that ends too early fails this near to its end.
_CUT_MARGIN = 16
# Names under which files keep their list of records.
_LISTS = ("data", "instances", "examples", "records", "rows", "train")


def json_line_records(path: Path) -> Iterator[tuple[Any, str]]:
    """One value a line, blank lines skipped, each with its place.

    A file that begins with a list, or with an object over several lines, is read as
    :func:`json_file_records` does.

    Raises:
        LoramError: A line is not JSON that can be used; names it.
    """
    first = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if first and (line.lstrip()[0] == "[" or line.strip() == "{"):
            yield from json_file_records(path)
            return
        first = False
        try:
            value = json.loads(line)
            _check_text(value, line, 0, len(line))
        except (ValueError, RecursionError) as error:
            raise _fault(path, number, error) from error
        yield value, f"{path}, line {number}"


def json_file_records(path: Path) -> Iterator[tuple[Any, str]]:
    """The records of a ``.json`` file: a list, an object that holds the list, or values in a row.

    A list and values in a row are read one by one, however large the file is.

    Raises:
        LoramError: It is not JSON that can be used; names the line.
    """
    window = _Window(path)
    if window.next_character() == "[":
        yield from _list_items(window)
        return
    first, line = window.value()
    if not window.next_character():
        if not isinstance(first, dict):
            raise LoramError(f"{path}: expected a list of records, not {kind_of(first)}")
        items = _held_list(first)
        if items is None:
            yield first, f"{path}, line {line}"
            return
        yield from ((item, f"{path}, record {n}") for n, item in enumerate(items, 1))
        return
    yield first, f"{path}, line {line}"
    while window.next_character():
        value, line = window.value()
        yield value, f"{path}, line {line}"


def decoded(value: Any) -> Any:
    """The list or object that a text is the JSON of, as tables hold them; else the value itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def decoded_turns(value: Any) -> Any:
    """As :func:`decoded`, for lists of messages only: an answer in JSON is an answer."""
    found = decoded(value)
    if isinstance(value, str) and not (
        isinstance(found, list)
        and found
        and all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in found)
    ):
        return value
    return found


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _list_items(window: "_Window") -> Iterator[tuple[Any, str]]:
    window.expect("[")
    number = 0
    while window.next_character() != "]":
        if number:
            window.expect(",")
        value, _ = window.value()
        number += 1
        yield value, f"{window.path}, record {number}"
    window.expect("]")
    if window.next_character():
        raise LoramError(f"{window.path}, line {window.line()}: text after the end of the list")


def _held_list(value: dict[str, Any]) -> list[Any] | None:
    """The list of a value such as ``{"version": 1, "data": [...]}``; None for a record."""
    held = [key for key in _LISTS if isinstance(value.get(key), list)]
    if len(held) != 1 or not all(isinstance(item, dict) for item in value[held[0]]):
        return None
    return list(value[held[0]])


class _Window:
    """The part of a JSON file that is being read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces = read_pieces(path)
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._lines_before = 0
        self._ended = False

    def line(self) -> int:
        """The number of the line that is read next, from 1."""
        return self._lines_before + self._text.count("\n", 0, self._at) + 1

    def next_character(self) -> str:
        """The next character that is no space, which is not taken; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill(1):
                return ""

    def expect(self, character: str) -> None:
        """Take one character.

        Raises:
            LoramError: Another one stands there.
        """
        if self.next_character() != character:
            error = json.JSONDecodeError(f"Expecting '{character}'", self._text, self._at)
            raise self._broken(error) from error
        self._at += 1

    def value(self) -> tuple[Any, int]:
        """Take one value; returns it and the number of the line on which it begins.

        Raises:
            LoramError: There is none, or it is longer than ``LONGEST_RECORD``.
        """
        self.next_character()
        line = self.line()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                _check_text(value, self._text, self._at, end)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._text) - _CUT_MARGIN
                )
                # Before more is read, which forgets the lines that its place counts from.
                broken = self._broken(error)
                if cut and self._fill(len(self._text) - self._at):
                    continue
                raise broken from error
            except (ValueError, RecursionError) as error:
                raise _fault(self.path, line, error) from error
            self._at = end
            return value, line

    def _fill(self, characters: int) -> bool:
        """Read at least so many more; false at the end."""
        self._lines_before += self._text.count("\n", 0, self._at)
        parts, self._at = [self._text[self._at :]], 0
        length, added = len(parts[0]), 0
        while added < characters and not self._ended:
            piece = next(self._pieces, None)
            self._ended = piece is None
            parts.append(piece or "")
            added += len(piece or "")
        self._text = "".join(parts)
        if length > LONGEST_RECORD:
            raise LoramError(
                f"{self.path}, line {self._lines_before + 1}: one JSON value of more than "
                f"{LONGEST_RECORD >> 20} MiB",
                "write a list of records, or one record a line (.jsonl)",
            )
        return added > 0

    def _broken(self, error: json.JSONDecodeError) -> LoramError:
        return _broken_json(self.path, self._lines_before + error.lineno, error)


def _check_text(value: Any, text: str, start: int, end: int) -> None:
    """Refuse half of a surrogate pair, which no tokenizer takes and no file can hold.

    Raises:
        ValueError: There is one in the value's text.
    """
    if _SURROGATE_ESCAPE.search(text, start, end) is None:
        return
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise ValueError("text with half of a surrogate pair (\\ud800 to \\udfff)")
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _fault(path: Path, line: int, error: Exception) -> LoramError:
    if isinstance(error, json.JSONDecodeError):
        return _broken_json(path, line, error)
    if isinstance(error, RecursionError):
        return LoramError(f"{path}, line {line}: JSON is nested too deeply")
    if "digits" in str(error):
        return LoramError(f"{path}, line {line}: a whole number of more than 4300 digits")
    return LoramError(f"{path}, line {line}: {error}")


def _broken_json(path: Path, line: int, error: json.JSONDecodeError) -> LoramError:
    return LoramError(f"{path}, line {line}: broken JSON ({error.msg}, column {error.colno})")
