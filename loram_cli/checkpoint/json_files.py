"""JSON objects from files of strangers: of regular files, of bounded size, with finite numbers."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram_cli import reading
from loram_cli.errors import LoramError, UsageError

# What these hold may be without limit, and stands as Infinity in published files.
_UNLIMITED = ("time_step_limit",)
# Half a character can only be written as an escape: the text itself is UTF-8.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(file: Path) -> str:
    """The text of a regular file of a model directory.

    Raises:
        LoramError: See :func:`loram_cli.reading.read_text`; no flag or recipe is to blame here.
    """
    try:
        return reading.read_text(file)
    except UsageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            hint = "is this a Hugging Face model directory?"
            raise LoramError(f"{file}: no such file", hint) from error
        raise LoramError(error.message) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LoramError: See :func:`read_text`; or it is not JSON, not an object, or has a number that
            is not finite.
    """
    text = read_text(file)
    # A tokenizer holds a million strings, and every command reads one: looked through only where
    # there may be something to find.
    infinite: list[float] = []

    def number(digits: str) -> float:
        found = float(digits)
        if not math.isfinite(found):
            infinite.append(found)
        return found

    try:
        value = json.loads(text, parse_float=number, parse_constant=number)
        unsound = _unsound(value) if infinite or _SURROGATE.search(text) else None
    except (ValueError, RecursionError) as error:
        raise LoramError(f"{file}: not valid JSON ({str(error)[:100]})") from error
    if not isinstance(value, dict):
        raise LoramError(f"{file}: expected a JSON object")
    if unsound is not None:
        raise LoramError(f"{file}: {unsound}")
    return value


def _unsound(value: object, key: str = "") -> str | None:
    """What is wrong with a value or with one inside it: NaN, infinity, half a character."""
    if isinstance(value, float) and not math.isfinite(value) and key not in _UNLIMITED:
        return f"{key} is {value}, expected a finite number"
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{key or 'a key'} has half a character (a lone surrogate)"
    inner: list[str | None] = []
    if isinstance(value, Mapping):
        for name, item in value.items():
            inner += [_unsound(name), _unsound(item, name)]
    elif isinstance(value, list):
        inner = [_unsound(item, key) for item in value]
    return next(filter(None, inner), None)
