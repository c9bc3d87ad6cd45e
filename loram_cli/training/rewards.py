"""Rewards of completions: the built-in check of the number, and functions from Python files.

A function is called as TRL calls one: with ``prompts``, ``completions`` and every further field of
the records by name, each a list of one entry for each completion; it returns as many numbers, or
None where it does not judge.
"""

import ast
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.config_values import short
from loram_cli.errors import LoramError, UsageError
from loram_cli.reading import home_expanded, read_text

# A completion that the data set's number is read from, and compared with, as ``eval`` does.
EXACT = "exact"
_MOST_BYTES = 1 << 20
# The column that holds a record's fields, as JSON.
FIELDS = "record"
Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class RewardName:
    """One ``--reward``.

    Attributes:
        text: As it was given.
        file: The Python file; None for the built-in check.
        function: In that file.
    """

    text: str
    file: Path | None = None
    function: str = ""

    @property
    def label(self) -> str:
        """A short name for logs and curves."""
        return self.function or self.text


def parse_reward(text: str) -> RewardName:
    """``exact``, or ``FILE.py:FUNCTION``.

    Raises:
        UsageError: It is neither.
    """
    if text == EXACT:
        return RewardName(text)
    name, colon, function = text.rpartition(":")
    if not colon or not name.endswith(".py") or not function.isidentifier():
        raise UsageError(
            f"--reward {text}: expected FILE.py:FUNCTION, or {EXACT}",
            "for instance --reward rewards.py:short_answers",
        )
    return RewardName(text, home_expanded(name), function)


def check_reward(name: RewardName) -> None:
    """See that a file is there and defines the function, without running it.

    Raises:
        LoramError: It is not there, no Python, or does not define the function.
    """
    if name.file is None:
        return
    try:
        if not name.file.exists():
            raise LoramError(f"--reward {name.text}: no such file")
        tree = ast.parse(read_text(name.file, most_bytes=_MOST_BYTES), str(name.file))
    except (OSError, ValueError) as error:
        raise LoramError(f"--reward {name.text}: cannot be read ({error})") from error
    except (RecursionError, MemoryError) as error:
        raise LoramError(f"{name.file}: nested too deep") from error
    except SyntaxError as error:
        raise LoramError(f"{name.file}, line {error.lineno}: no Python ({error.msg})") from error
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    defined |= {alias.asname or alias.name for node in imports for alias in node.names}
    if name.function not in defined and "*" not in defined:
        raise LoramError(
            f"{name.file}: defines no function '{name.function}'",
            f"it defines: {', '.join(sorted(defined)) or 'nothing'}",
        )


def load_reward(name: RewardName) -> Reward:
    """The function of a file, which runs all of the file.

    Raises:
        LoramError: The file fails, or holds no such function.
    """
    assert name.file is not None, "the built-in reward has no file"
    module_name = f"loram_reward_{name.file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, name.file)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise LoramError(f"{name.file}: {_said(error, name.file)}") from error
    function = getattr(module, name.function, None)
    if not callable(function):
        raise LoramError(f"{name.file}: '{name.function}' is no function")
    return _checked(name, function)


def with_fields(reward: Reward) -> Reward:
    """The function, given the records' fields by name in place of the one text of all of them."""

    def call(completions: list[str], **given: Any) -> list[float | None]:
        records = [json.loads(text or "{}") for text in given.pop(FIELDS, ())]
        names = dict.fromkeys(name for record in records for name in record)
        # The record's own answer, and none of what TRL gives names to.
        given.pop("answer", None)
        own = {n: [r.get(n) for r in records] for n in names if n not in given}
        return reward(completions=completions, **own, **given)

    call.__name__ = reward.__name__
    return call


def _checked(name: RewardName, function: Callable[..., Any]) -> Reward:
    """The function, its failures and its results told in the user's terms."""

    def reward(completions: Sequence[str], **fields: Any) -> list[float | None]:
        try:
            found = function(completions=list(completions), **fields)
        except (Exception, SystemExit) as error:
            assert name.file is not None
            raise LoramError(
                f"--reward {name.text}: {_said(error, name.file)}",
                "it is called as function(prompts, completions, **fields), each a list",
            ) from error
        return _numbers(found, len(completions), name)

    reward.__name__ = name.function
    return reward


def _numbers(found: Any, count: int, name: RewardName) -> list[float | None]:
    values = list(found) if hasattr(found, "__iter__") and not isinstance(found, str) else None
    if values is None or len(values) != count:
        what = f"{len(values)} values" if values is not None else type(found).__name__
        raise LoramError(
            f"--reward {name.text}: gave {what} for {count} completions",
            "it must return a list with one number for each completion",
        )
    numbers: list[float | None] = []
    for value in values:
        number = None if value is None else _number(value)
        if number is not None and not math.isfinite(number):
            raise LoramError(
                f"--reward {name.text}: {short(value)} is no finite number",
                "return numbers, or None where it does not judge",
            )
        numbers.append(number)
    return numbers


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _said(error: BaseException, file: Path) -> str:
    """What went wrong, and in which line of the file."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f"line {line}, " if line is not None else ""
    return f"{where}{type(error).__name__}: {error}"
