"""Loads what is kept in memory: preferences, judged answers, questions."""

from collections.abc import Callable, Iterable
from typing import Any, TypedDict, TypeVar, Unpack

from loram_cli.reporting import NullReporter, Reporter
from loram_cli.training.choices import Exhausted
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.records import Record, read_records
from loram_cli.training.data.sources import load_sources
from loram_cli.training.data.tally import UnusableRecord

T = TypeVar("T")


class Loading(TypedDict, total=False):
    """How to load a source.

    Attributes:
        tokenizer: Renders messages by its chat template; none by default.
        limit: Read so many records only; all by default.
        reporter: Told of what is left out.
        seed: Of a mixture, 0 by default.
        exhausted: Of a mixture, ``stop`` by default.
    """

    tokenizer: Any
    limit: int | None
    reporter: Reporter | None
    seed: int
    exhausted: Exhausted


def load_each(
    source: str,
    read: Callable[[Record, Chat], Iterable[T]],
    what: str,
    hint: str,
    **how: Unpack[Loading],
) -> list[T]:
    """What the records of a source give, those that give nothing left out and told.

    Args:
        source: As for :func:`.documents.load_instructions`.
        read: Gives the items of a record; may raise ``UnusableRecord``.
        what: The items in words, for the error where there are none.
        hint: What that error says to do.
        how: See :class:`Loading`.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    reporter = how.get("reporter") or NullReporter()
    limit = how.get("limit")

    def load(name: str) -> list[T]:
        chat = Chat(how.get("tokenizer"))
        found: list[T] = []
        for record in read_records(name, limit=limit):
            try:
                for item in read(record, chat):
                    found.append(item)
            except UnusableRecord as unusable:
                chat.tally.leave_out(unusable)
        if not found:
            raise chat.tally.nothing_left(name, what, hint)
        chat.tally.tell(name, reporter)
        chat.warn_of_fallback(reporter)
        return found

    seed, exhausted = how.get("seed", 0), how.get("exhausted", "stop")
    return list(load_sources(source, load, limit=limit, seed=seed, exhausted=exhausted))
