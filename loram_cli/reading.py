"""The one reader of users' YAML and JSON: regular files only, of bounded size and depth."""

import json
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from loram_cli.errors import UsageError

if TYPE_CHECKING:
    import yaml

# Recipes, settings and plans are short; a tokenizer of 64 MiB has been seen.
YAML_BYTES = 1 << 20
JSON_BYTES = 256 << 20
_PROMPT_CHARACTERS = 4 << 20
# What an alias stands for counts as often as it is used.
_EXPANDED_BYTES = 1 << 20
_NODE_BYTES = 16


def home_expanded(text: str) -> Path:
    """A path with ``~`` and ``~user`` replaced; one of a user that is not there stays as it is."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def read_text(file: Path, *, most_bytes: int = JSON_BYTES) -> str:
    """The text of a regular file; a pipe or a device, which may have no end, is refused.

    Raises:
        UsageError: It is absent, no regular file, too large, unreadable or not UTF-8.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{file}: is not a regular file")
        if status.st_size > most_bytes:
            raise UsageError(f"{file}: larger than {most_bytes >> 20} MiB")
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{file}: cannot be read ({reason})") from error


def read_yaml(file: Path) -> Any:
    """What a YAML file says.

    Raises:
        UsageError: See :func:`read_text`; also no YAML, nested too deep, or aliases that expand
            past 1 MiB, a key that stands twice in a mapping, or a number such as 010, which YAML
            takes for 8.
    """
    import yaml  # takes longer than the rest of a --help

    text = read_text(file, most_bytes=YAML_BYTES)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _expanded_bytes(node, {}) > _EXPANDED_BYTES:
                raise UsageError(f"{file}: its aliases expand past {_EXPANDED_BYTES >> 20} MiB")
            _refuse_misleading(node, file, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise UsageError(f"{file}: nested too deep") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f", line {line + 1}" if line is not None else ""
        raise UsageError(f"{file}{place}: not valid YAML") from error


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        UsageError: See :func:`read_text`; also no JSON, or nested too deep.
    """
    text = read_text(file)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UsageError(f"{file}: nested too deep") from error
    except ValueError as error:
        raise UsageError(f"{file}: not valid JSON ({error})") from error


def read_stdin(stream: TextIO, *, line: bool = False) -> str:
    """What is piped in, or its next line with its end.

    Raises:
        UsageError: It is longer than a prompt can be, and may have no end.
    """
    text = stream.readline(_PROMPT_CHARACTERS + 1) if line else stream.read(_PROMPT_CHARACTERS + 1)
    if len(text) > _PROMPT_CHARACTERS:
        raise UsageError(f"standard input: more than {_PROMPT_CHARACTERS >> 20} Mi characters")
    return text


def read_scalar(text: str) -> Any:
    """A flag's or a variable's text as YAML reads a number, a switch or ``null``; else the text."""
    import yaml  # takes longer than the rest of a --help

    if re.fullmatch(r"[+-]?[0-9]{1,100}", text):
        return int(text)  # YAML takes 010 for 8
    # Short and plain: nothing here can nest, alias or take long.
    if len(text) > 100 or not re.fullmatch(r"[\w.+~-]*", text):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def _refuse_misleading(node: "yaml.Node", file: Path, seen: set[int]) -> None:
    """Refuse what YAML reads otherwise than most people, without a word.

    Of a key that stands twice in a mapping it keeps the last; 010 is 8 to it, and 1:30 is 90.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node.value, str):
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        octal = kind == "int" and re.match(r"[+-]?0[0-9_]", node.value)
        if octal or (kind in ("int", "float") and ":" in node.value):
            line = node.start_mark.line + 1
            raise UsageError(
                f"{file}, line {line}: {node.value} is another number in YAML than it looks",
                "write it in decimal digits, without a zero in front",
            )
        return
    keys: set[str] = set()
    for part in node.value:
        items = part if isinstance(part, tuple) else (part,)
        if len(items) == 2 and isinstance(key := items[0].value, str):
            if key in keys:
                line = items[0].start_mark.line + 1
                raise UsageError(f"{file}, line {line}: '{key}' stands twice", "keep one of them")
            keys.add(key)
        for item in items:
            _refuse_misleading(item, file, seen)


def _expanded_bytes(node: "yaml.Node", known: dict[int, int]) -> int:
    """Size of a node with every alias written out; a node inside itself has no end."""
    found = known.get(id(node))
    if found is not None:
        return found
    known[id(node)] = _EXPANDED_BYTES + 1
    size = _NODE_BYTES
    # A scalar's text, a sequence's nodes or a mapping's pairs of nodes.
    if isinstance(node.value, str):
        size += len(node.value)
    else:
        parts = (part if isinstance(part, tuple) else (part,) for part in node.value)
        size += sum(_expanded_bytes(item, known) for part in parts for item in part)
    known[id(node)] = size
    return size
