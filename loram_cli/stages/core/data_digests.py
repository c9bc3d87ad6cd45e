"""Digests of the data that a stage reads, so that other data is another input."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from loram_cli.demo.problems import load_demo
from loram_cli.errors import LoramError, UsageError
from loram_cli.reading import home_expanded
from loram_cli.runs.digests import file_digests
from loram_cli.schema import Spec, digest_of
from loram_cli.training.data.records import DEMO_PREFIX, local_files
from loram_cli.training.data.sources import parse_sources

# Settings of any spec that name data: held-out, calibration and alignment text as well.
DATA_SETTINGS = ("data", "eval_data", "calibration")


def data_records(spec: Spec) -> dict[str, dict[str, str]]:
    """The manifest's records of the data that a spec names.

    A data set on the hub is known only by its name, which is in the spec.

    Raises:
        LoramError: A file is not there, or cannot be read.
    """
    named = {name: getattr(spec, name, None) for name in DATA_SETTINGS}
    found = {name: (data, data_digest(data)) for name, data in named.items() if data}
    records = {
        name: {"path": data, "content": digest}
        for name, (data, digest) in found.items()
        if digest is not None
    }
    for name, file in _single_files(spec):
        [digest] = _known_digests((_state(file),))
        records[name] = {"path": str(file), "content": digest}
    return records


def _single_files(spec: Spec) -> Iterator[tuple[str, Path]]:
    """Files that decide what is learnt beside the data: a chat template, reward functions."""
    template = getattr(spec, "chat_template", None)
    if template is not None and home_expanded(template).is_file():
        yield "chat_template", home_expanded(template)
    for text in getattr(spec, "reward", ()):
        file = home_expanded(text.rpartition(":")[0])
        if file.is_file():
            yield f"reward {text}", file


def data_digest(data: str) -> str | None:
    """Digest of all that is local behind a data setting, in its order; None where nothing is.

    Raises:
        LoramError: As :func:`data_records`.
    """
    parts: list[str] = []
    for source in parse_sources(data):
        if source.name.startswith(DEMO_PREFIX):
            parts.append(_demo_digest(source.name.removeprefix(DEMO_PREFIX)))
            continue
        states = [_state(file) for file in local_files(source.name) or ()]
        digests = _known_digests(tuple(states))
        # Records of a file are read by its suffix, and the name says nothing else.
        parts += [f"{digest}{Path(s[0]).suffix}" for digest, s in zip(digests, states, strict=True)]
    return digest_of(parts) if parts else None


def _state(file: Path) -> tuple[str, int, int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise LoramError(f"{file}: cannot be read ({error.strerror})") from error
    return str(file), status.st_ino, status.st_size, status.st_mtime_ns


@cache
def _known_digests(states: tuple[tuple[str, int, int, int], ...]) -> tuple[str, ...]:
    """Digests of files, which the stages of one run read once as long as they stay the same."""
    return tuple(file_digests([Path(state[0]) for state in states]))


@cache
def _demo_digest(name: str) -> str:
    try:
        return digest_of(load_demo(name))
    except ValueError as error:
        raise UsageError(str(error)) from None
