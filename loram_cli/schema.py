"""Settings: typed dataclass fields that carry their own help, range and flag.

A field of a spec is declared once::

    steps: int = setting(400, help="Optimizer steps.", at_least=1)

From it come the command's flag (:mod:`loram_cli.cli.from_spec`), the keys of recipes and settings
files, the checks of type and range, and the key under which an output is known. What is not a
setting but an amount has a type: :class:`Bytes`, :class:`Params`.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from loram_cli.errors import UsageError
from loram_cli.reading import home_expanded, read_scalar
from loram_cli.units import GIB, MIB, parse_bytes, parse_params

T = TypeVar("T")
# An error is a line or two; lm-eval itself knows thousands of tasks.
_MOST_NAMES = 16
_METADATA = "loram"
# Heading of ``--help`` for where things lie and how a command speaks.
RUN_PANEL = "Run and output"
# What is smaller is 0 in single precision, sooner or later.
_SMALLEST = 2.0**-100
# Of a value that is quoted in an error.
_QUOTED = 60


class Bytes(int):
    """An amount of memory or disk; written ``4GiB``, ``500MB`` or as a number of bytes."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an amount.

        Raises:
            UsageError: It is not one.
        """
        return cls(parse_bytes(text))

    @property
    def text(self) -> str:
        """As a user would write it."""
        for unit_bytes, unit in ((GIB, "GiB"), (10**9, "GB"), (MIB, "MiB"), (10**6, "MB")):
            if self and self % unit_bytes == 0:
                return f"{self // unit_bytes}{unit}"
        return str(int(self))


class Params(int):
    """A count of parameters; written ``6B``, ``350M`` or as a number."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a count.

        Raises:
            UsageError: It is not one.
        """
        return cls(parse_params(text))

    @property
    def text(self) -> str:
        """As a user would write it."""
        return str(int(self))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field of a spec says of itself.

    Attributes:
        help: One line; the default is added where it is shown.
        flag: The option's name; None derives it from the field's, and "" gives it none.
        place: Filled in from the run directory or the command line: no key of recipes, settings
            files or the environment.
        default_text: What a default of None means, in words.
        at_least: Lowest value.
        above: All values are above this one.
        at_most: Highest value.
        below: All values are below this one.
        in_key: Whether it decides what comes out; else it says where things lie, or how fast to go.
            ``"changed"`` lets it enter the key only where it is not the default, so that outputs
            from before there was such a setting keep theirs.
        private: Left out of model cards, which are meant to be published.
        repeat: The option is given once for each value; else values are separated by commas.
        switch: A flag that only turns on, without ``--no-``.
        env: A variable of its own, besides ``LORAM_<STAGE>_<SETTING>``.
        argument: Stands on the command line without a flag.
        choices: Gives the words that are allowed, where a table and not the type tells them.
        form: A pattern that a text must match, and what to pass.
        panel: Heading of ``--help`` that it stands under; None is among the first.
    """

    help: str
    flag: str | None = None
    place: bool = False
    default_text: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    in_key: bool | Literal["changed"] = True
    private: bool = False
    repeat: bool = False
    switch: bool = False
    env: str | None = None
    argument: bool = False
    choices: Callable[[], Iterable[str]] | None = None
    form: tuple[str, str] | None = None
    panel: str | None = None


def setting(default: Any = MISSING, *, factory: Any = MISSING, **told: Any) -> Any:
    """A dataclass field that is a :class:`Setting`.

    Args:
        default: Its value where nothing else is said; a field without one must be given.
        factory: Makes the default, for mappings.
        **told: See :class:`Setting`.
    """
    metadata = {_METADATA: Setting(**told)}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def redefined(owner: type, name: str, default: Any = None, **told: Any) -> Any:
    """A field of a base class with another default, and perhaps another help text.

    Args:
        owner: The base class.
        name: The field.
        default: Its default here; None keeps that of the base class.
        **told: What else differs; see :class:`Setting`.
    """
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    told_here = dataclasses.replace(setting_of(field), **told)
    return dataclasses.field(
        default=field.default if default is None else default, metadata={_METADATA: told_here}
    )


def setting_of(field: "Field[Any]") -> Setting:
    """What a field says of itself; a plain dataclass field says nothing."""
    return field.metadata.get(_METADATA, Setting(help=""))


def settings_of(spec: Any) -> Iterator[tuple["Field[Any]", Setting]]:
    """Every field of a spec, or of its class, with what it says of itself."""
    for field in dataclasses.fields(spec):
        yield field, setting_of(field)


def flag_of(name: str, told: Setting) -> str:
    """The option's name, such as ``--learning-rate``; the bare field name where it has none."""
    if told.flag is None:
        return f"--{name.replace('_', '-')}"
    return told.flag or name


def flag(spec: Any, name: str) -> str:
    """The option of a spec's field, for messages."""
    return next(flag_of(name, told) for field, told in settings_of(spec) if field.name == name)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a stage is asked for: checked when it is built, and never changed.

    A subclass checks in :meth:`check` what depends on several fields, without reading a file.
    """

    def __post_init__(self) -> None:
        for field, told in settings_of(self):
            value, name = getattr(self, field.name), flag_of(field.name, told)
            check_range(value, name, told, most=_largest(field.type, told))
            check_choice(value, name, told)
            check_form(value, name, told)
        self.check()

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            UsageError: They do not.
        """

    def settled(self) -> Self:
        """The spec with every setting that depends on others filled in, as manifests record it."""
        return self


def check_range(value: Any, name: str, told: Setting, *, most: float) -> None:
    """Refuse a number outside its range, NaN and infinity included.

    Args:
        value: Of the setting; what is no number passes.
        name: Of its flag.
        told: Its range.
        most: Beyond any range.

    Raises:
        UsageError: It is outside.
    """
    if isinstance(value, tuple | list):
        for item in value:
            check_range(item, name, told, most=most)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} {value} is not a finite number")
    if abs(value) > most:
        raise UsageError(f"{name} is larger than 2^{math.log2(most):g}, which nothing here can be")
    if 0 < abs(value) < _SMALLEST:
        raise UsageError(f"{name} {value:g} is too small to be told from 0")
    if _inside(value, told):
        return
    shown = value.text if isinstance(value, Bytes | Params) else f"{value:g}"
    raise UsageError(f"{name} {_range_text(told, shown)}")


def _largest(kind: Any, told: Setting) -> float:
    """What no number of a field's type can be above: counts are far below amounts."""
    parts = {kind, *typing.get_args(kind)}
    counts = int in parts and not parts & {Bytes, Params} and told.at_most is None
    return 2.0**31 if counts else 2.0**63


def _range_text(told: Setting, shown: str) -> str:
    """What is wrong with a number outside its range."""
    lower = told.at_least if told.above is None else told.above
    upper = told.at_most if told.below is None else told.below
    if lower is not None and upper is not None:
        left, right = "[" if told.above is None else "(", "]" if told.below is None else ")"
        return f"{shown} is outside {left}{lower:g}, {upper:g}{right}"
    # Whole numbers from 1 on and others above 0 read alike.
    if told.above == 0 or told.at_least == 1:
        return f"must be above 0, not {shown}"
    if told.at_least == 0:
        return f"cannot be negative ({shown})"
    if lower is not None:
        return f"must be {'at least' if told.above is None else 'above'} {lower:g}, not {shown}"
    return f"must be {'at most' if told.below is None else 'below'} {upper:g}, not {shown}"


def check_choice(value: Any, name: str, told: Setting) -> None:
    """Refuse a word that the setting's table does not have.

    Raises:
        UsageError: There is no such word.
    """
    if told.choices is None or value is None:
        return
    known = list(told.choices())
    for word in value if isinstance(value, tuple | list) else (value,):
        if word not in known:
            raise unknown_name("value", str(word), known, name)


def check_form(value: Any, name: str, told: Setting) -> None:
    """Refuse a text that is not of the setting's form.

    Raises:
        UsageError: It is not.
    """
    if told.form is None or value is None:
        return
    pattern, hint = told.form
    if not re.fullmatch(pattern, value):
        shown = value if re.fullmatch(r"[!-~]{1,60}", value) else _quoted(value)
        raise UsageError(f"{name} {shown}: unknown", hint)


def _inside(value: float, told: Setting) -> bool:
    return not (
        (told.at_least is not None and value < told.at_least)
        or (told.above is not None and value <= told.above)
        or (told.at_most is not None and value > told.at_most)
        or (told.below is not None and value >= told.below)
    )


def spec_from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass ``cls`` from plain values, checking names and types.

    Returns:
        An instance of ``cls``.

    Raises:
        UsageError: An unknown key (with the nearest known one), a missing key, a wrong type.
    """
    hints = hints_of(cls)
    for key in values:
        if key not in hints:
            raise unknown_name("key", key, hints, where)
    converted = {
        key: convert(hints[key], value, f"{where}: {key}") for key, value in values.items()
    }
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in converted:
            raise UsageError(f"{where}: '{field.name}' is missing")
    return cls(**converted)


def hints_of(cls: type) -> dict[str, Any]:
    """The type of every field of a dataclass, in the order of the fields."""
    return _hints(cls)


@cache
def _hints(cls: type) -> dict[str, Any]:
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def spec_to_mapping(spec: Any) -> dict[str, Any]:
    """The plain, JSON-ready form of a spec."""
    return {f.name: plain(getattr(spec, f.name)) for f in dataclasses.fields(spec)}


def digest_of(value: Any) -> str:
    """SHA-256 over the canonical JSON of a plain value, as ``sha256:<hex>``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def unknown_name(kind: str, name: str, known: Iterable[str], where: str) -> UsageError:
    """The error for a name that does not exist, with the nearest one that does."""
    names = list(known)
    # YAML keys may be numbers, and then have no neighbours.
    close = difflib.get_close_matches(str(name), names, n=1)
    more = f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    known_names = ", ".join(names[:_MOST_NAMES]) + more
    hint = f"did you mean '{close[0]}'?" if close else f"known: {known_names}"
    return UsageError(f"{where}: unknown {kind} '{name}'", hint)


def plain(value: Any) -> Any:
    """A value as JSON holds it: dataclasses and mappings as objects, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return spec_to_mapping(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def alternatives(hint: Any) -> list[Any]:
    """The types that a hint allows, without None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return [hint]


def literals(hint: Any) -> list[str]:
    """The words that a hint allows, inside unions and tuples too; empty where any will do."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [word for arg in typing.get_args(hint) for word in literals(arg)]


def convert(hint: Any, value: Any, where: str) -> Any:
    """A plain value as the type that a spec's field has.

    Raises:
        UsageError: The value is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert_union(alternatives(hint), value, where)
    if origin is Literal:
        if value not in args:
            raise unknown_name("value", str(value), map(str, args), where)
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UsageError(f"{where}: expected a list, not {_quoted(value)}")
        return tuple(convert(args[0], item, where) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: expected a mapping, not {_quoted(value)}")
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
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if hint in (Bytes, Params):
        if is_whole:
            return hint(value)
        if isinstance(value, str):
            try:
                return hint.parse(value)
            except UsageError as error:
                raise UsageError(f"{where}: {error.message}", error.hint) from error
    if hint is Path and isinstance(value, str | Path) and "\0" not in str(value):
        if value == "":
            raise UsageError(f"{where}: expected a path, and it is empty")
        return home_expanded(str(value))
    # YAML 1.1 reads 1e-5 as text, since it lacks the dot that its float syntax demands.
    if hint is float and (is_whole or isinstance(value, float | str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if (hint is int and is_whole) or (hint in (str, bool) and isinstance(value, hint)):
        return value
    if hint is Any:
        return value
    name = {
        Path: "a path",
        float: "a number",
        int: "a whole number",
        str: "text",
        bool: "true or false",
        Bytes: "an amount such as 4GiB",
        Params: "a count such as 6B",
    }
    raise UsageError(f"{where}: expected {name.get(hint, hint)}, not {_quoted(value)}")


def _quoted(value: Any) -> str:
    """A value as an error shows it; Python refuses to write out integers of 4300 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a very long {type(value).__name__}"
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def from_text(hint: Any, text: str) -> Any:
    """A flag's or a variable's text as the plain value that a YAML file would hold."""
    options = alternatives(hint)
    origins = [typing.get_origin(option) for option in options]
    words = [word.strip() for word in text.split(",") if word.strip()]
    if tuple in origins:
        item = typing.get_args(options[origins.index(tuple)])[0]
        return [from_text(item, word) for word in words]
    if dict in origins:
        pairs = [word.partition("=") for word in words]
        return {name: value for name, _, value in pairs}
    if any(option in (int, float, bool) for option in options):
        return read_scalar(text)
    return text


# What :func:`revived` raises on a value of another kind.
NOT_REVIVED = (AttributeError, KeyError, TypeError, ValueError)


def revived(hint: Any, value: Any) -> Any:
    """What :func:`plain` made of a dataclass, a tuple or a mapping of these, as it was.

    Keys that the class does not have are left out, and absent ones take their defaults: records
    are written by one version and read by another.
    """
    if value is None:
        return None
    (hint,) = alternatives(hint)[:1]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = hints_of(hint)
        return hint(**{k: revived(hints[k], v) for k, v in value.items() if k in hints})
    if origin is tuple:
        return tuple(revived(args[0], item) for item in value)
    if origin in (dict, Mapping):
        return {key: revived(args[1], item) for key, item in value.items()}
    return value
