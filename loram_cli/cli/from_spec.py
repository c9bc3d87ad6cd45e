"""A command's signature from dataclass fields: each flag is a field, and stands nowhere else.

A command is a function of the values that were given and, where it has options that are no
settings of its stage (``--run``, ``--json``), of these. Both are declared as dataclasses of
:func:`~loram_cli.schema.setting` fields; this makes one Typer function of them.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from loram_cli.errors import UsageError
from loram_cli.schema import (
    RUN_PANEL,
    Bytes,
    Params,
    Setting,
    alternatives,
    convert,
    flag_of,
    from_text,
    hints_of,
    literals,
    settings_of,
)

O = TypeVar("O")  # noqa: E741 - options
Values = dict[str, Any]


def command_of(
    function: Callable[[Values, O], None], spec: type | None, options: type[O]
) -> Callable[..., None]:
    """A function that Typer takes for a command.

    Args:
        function: The command: called with the given values of the spec's fields, typed, and with
            the options. Its docstring is the help text.
        spec: The dataclass of the stage's settings; None for a command without a stage.
        options: The dataclass of the command's own options.

    Returns:
        A function with a flag for each field.
    """
    settings = list(_flags(spec)) if spec is not None else []
    own = list(_flags(options))

    def command(**given: Any) -> None:
        values = _given(settings, given)
        function(values, options(**_given(own, given)))

    parameters = [_parameter(field, told, hint) for field, told, hint in settings + own]
    # Arguments come first on the command line.
    parameters.sort(key=lambda parameter: parameter.name not in _arguments(settings + own))
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def help_text(field: "Field[Any]", told: Setting) -> str:
    """The help of a field, with its default."""
    default = default_text(field, told)
    return f"{told.help} (default: {default})" if default else told.help


def default_text(field: "Field[Any]", told: Setting) -> str:
    """The default as a user would write it; empty where there is nothing to tell."""
    if told.default_text is not None:
        return told.default_text
    value = field.default
    if value is MISSING or value is None or isinstance(value, bool) or value == ():
        return ""
    if isinstance(value, Bytes | Params):
        return value.text
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return str(value)


_Flag = tuple["Field[Any]", Setting, Any]


def _flags(source: type) -> Iterator[_Flag]:
    hints = hints_of(source)
    for field, told in settings_of(source):
        if told.flag != "":
            yield field, told, hints[field.name]


def _arguments(flags: list[_Flag]) -> set[str]:
    return {field.name for field, told, _ in flags if told.argument}


def _given(flags: list[_Flag], given: Values) -> Values:
    """What was given, each value as its field's type; errors name the flag."""
    values = {}
    for field, told, hint in flags:
        value = given[field.name]
        if value is None or (told.switch and not value) or (told.repeat and not value):
            continue
        where = flag_of(field.name, told)
        values[field.name] = convert(hint, _plain_value(hint, told, value, where), where)
    return values


def _plain_value(hint: Any, told: Setting, value: Any, where: str) -> Any:
    if told.repeat or isinstance(value, list):
        return _pairs(value, where) if _is_mapping(hint) else value
    return from_text(hint, value) if isinstance(value, str) else value


def _pairs(entries: list[str], where: str) -> dict[str, str]:
    pairs = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not name or not value:
            raise UsageError(f"{where} {entry}: expected NAME=FILE")
        pairs[name] = value
    return pairs


def _is_mapping(hint: Any) -> bool:
    return any(getattr(option, "__origin__", None) is dict for option in alternatives(hint))


def _parameter(field: "Field[Any]", told: Setting, hint: Any) -> inspect.Parameter:
    kind = _typer_type(told, hint)
    panel = told.panel or (RUN_PANEL if told.place else None)
    text = help_text(field, told)
    if told.argument:
        required = field.default is MISSING and not told.repeat and kind is not list[str]
        info: Any = typer.Argument(help=text)
        default: Any = inspect.Parameter.empty if required else None
    else:
        name = flag_of(field.name, told)
        if kind is bool and not told.switch:
            name = f"{name}/--no-{name.removeprefix('--')}"
        completion = _completion(told, hint)
        info = typer.Option(
            name,
            help=text,
            envvar=told.env,
            autocompletion=completion,
            rich_help_panel=panel,
            metavar="PATH" if kind is Path else None,
        )
        if kind is Path:
            kind = str  # an empty path would come as the current folder
        default = False if told.switch else None
    annotation = kind if told.switch or default is inspect.Parameter.empty else kind | None
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, info],
    )


def _typer_type(told: Setting, hint: Any) -> Any:
    """What Typer parses itself: numbers, paths and switches; all else comes as text."""
    options = alternatives(hint)
    first = options[0]
    is_list = getattr(first, "__origin__", None) is tuple
    if told.repeat or (told.argument and is_list):
        item = first.__args__[0] if is_list else str
        return list[item if item in (int, float, Path) else str]  # type: ignore[misc]  # at run time
    if len(options) == 1 and first in (bool, int, float, Path):
        return first
    return str


def _completion(told: Setting, hint: Any) -> Callable[[str], list[str]] | None:
    words = literals(hint)
    if not words and told.choices is None:
        return None

    def complete(incomplete: str) -> list[str]:
        known = list(told.choices()) if told.choices else words
        return [word for word in known if word.startswith(incomplete)]

    return complete
