"""Frozen specs from mappings (flags, recipes) and back, with errors that name the key."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from loram_cli.errors import UsageError

T = TypeVar("T")
# An error is a line or two; lm-eval alone knows thousands of tasks.
_MOST_NAMES = 16


def spec_from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass ``cls`` from plain values, checking names and types.

    Args:
        cls: A dataclass; its ``__post_init__`` checks ranges.
        values: Field values as they come from flags, YAML or JSON.
        where: What to name in errors, such as ``recipe demo.yaml, stage train``.

    Returns:
        An instance of ``cls``.

    Raises:
        UsageError: An unknown key (with the nearest known one), a missing key, a wrong type.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise unknown_name("key", key, known, where)
    hints = typing.get_type_hints(cls)
    converted = {
        key: convert(hints[key], value, f"{where}: {key}") for key, value in values.items()
    }
    for name, field in known.items():
        no_default = field.default is dataclasses.MISSING
        if no_default and field.default_factory is dataclasses.MISSING and name not in converted:
            raise UsageError(f"{where}: '{name}' is missing")
    return cls(**converted)


def spec_to_mapping(spec: Any) -> dict[str, Any]:
    """The plain, JSON-ready form of a spec."""
    return {f.name: _plain(getattr(spec, f.name)) for f in dataclasses.fields(spec)}


def digest_of(value: Any) -> str:
    """SHA-256 over the canonical JSON of a plain value, as ``sha256:<hex>``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def unknown_name(kind: str, name: str, known: typing.Iterable[str], where: str) -> UsageError:
    """The error for a name that does not exist, with the nearest one that does."""
    names = list(known)
    # YAML keys may be numbers, and then have no neighbours.
    close = difflib.get_close_matches(str(name), names, n=1)
    more = f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    known_names = ", ".join(names[:_MOST_NAMES]) + more
    hint = f"did you mean '{close[0]}'?" if close else f"known: {known_names}"
    return UsageError(f"{where}: unknown {kind} '{name}'", hint)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def convert(hint: Any, value: Any, where: str) -> Any:
    """A plain value as the type that a spec's field has.

    Args:
        hint: The field's type.
        value: As it comes from a flag, YAML, JSON or the environment.
        where: What to name in errors.

    Raises:
        UsageError: The value is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert_union([arg for arg in args if arg is not type(None)], value, where)
    if origin is Literal:
        if value not in args:
            raise unknown_name("value", str(value), map(str, args), where)
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UsageError(f"{where}: a list is wanted, not {value!r}")
        return tuple(convert(args[0], item, where) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: a mapping is wanted, not {value!r}")
        return {str(key): convert(args[1], item, where) for key, item in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(options: list[Any], value: Any, where: str) -> Any:
    for option in options[:-1]:
        try:
            return convert(option, value, where)
        except UsageError:
            continue
    return convert(options[-1], value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5 as text, since it lacks the dot that its float syntax demands.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    if hint is Any:
        return value
    name = {
        Path: "a path",
        float: "a number",
        int: "a whole number",
        str: "text",
        bool: "true or false",
    }
    raise UsageError(f"{where}: {name.get(hint, hint)} is wanted, not {value!r}")
