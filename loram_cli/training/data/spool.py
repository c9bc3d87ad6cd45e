"""Sequences that move to a file once they outgrow the memory that data may take."""

import os
import pickle
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, overload

T = TypeVar("T")

# Of text or token ids; Python's own objects around them take about as much again.
MEMORY_BYTES = 512 << 20
# On a disk by convention, where /tmp may be memory.
_FOLDER = Path("/var/tmp")
_ITEMS_AT_A_TIME = 256


class Lazy(Sequence[T]):
    """A sequence that makes a value when it is asked for it; a slice copies nothing."""

    def at(self, index: int) -> T:
        """The value at a place from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        found = range(len(self))[place]
        return self.at(found) if isinstance(found, int) else Subset(self, found)

    def __iter__(self) -> Iterator[T]:
        return map(self.at, range(len(self)))


class Subset(Lazy[T]):
    """Some values of a sequence, by their places."""

    def __init__(self, items: Sequence[T], places: Sequence[int]) -> None:
        self._items = items
        self._places = places if isinstance(places, range) else array("Q", places)

    def __len__(self) -> int:
        return len(self._places)

    def at(self, index: int) -> T:
        """The value at a place from 0 on."""
        return self._items[self._places[index]]


class Chain(Lazy[T]):
    """Sequences one after the other."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, index: int) -> T:
        """The value at a place from 0 on."""
        part = bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


class Spool(Lazy[T]):
    """A list that continues in a file once it holds too much.

    The file has no name and goes with the process, the only one that reads and writes it: what is
    unpickled is what was pickled.

    Args:
        size: Bytes of a value, about.
        memory_bytes: How much stays in memory.
    """

    def __init__(self, size: Callable[[T], int], memory_bytes: int) -> None:
        self._size, self._left = size, memory_bytes
        self._waiting: list[T] = []
        self._file: Any = None
        self._ends = array("Q", [0])

    def append(self, item: T) -> None:
        """Add a value at the end."""
        self._waiting.append(item)
        self._left -= self._size(item)
        if self._left < 0 and (self._file is None or len(self._waiting) >= _ITEMS_AT_A_TIME):
            self._write()

    def _write(self) -> None:
        if self._file is None:
            folder = None if "TMPDIR" in os.environ or not _FOLDER.is_dir() else _FOLDER
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this
            weakref.finalize(self, self._file.close)
        for item in self._waiting:
            written = self._file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            self._ends.append(self._ends[-1] + written)
        self._file.flush()
        self._waiting.clear()

    @property
    def on_disk(self) -> bool:
        """Whether most of it is in a file."""
        return self._file is not None

    def __len__(self) -> int:
        return len(self._ends) - 1 + len(self._waiting)

    def at(self, index: int) -> T:
        """The value at a place from 0 on."""
        stored = len(self._ends) - 1
        if index >= stored:
            return self._waiting[index - stored]
        begin, end = self._ends[index], self._ends[index + 1]
        found: T = pickle.loads(os.pread(self._file.fileno(), end - begin, begin))
        return found


def spooled(
    items: Iterable[T], size: Callable[[T], int], memory_bytes: int | None = None
) -> Sequence[T]:
    """All items: a list where they fit the memory that data may take, else a file."""
    spool = Spool(size, MEMORY_BYTES if memory_bytes is None else memory_bytes)
    for item in items:
        spool.append(item)
    return spool if spool.on_disk else list(spool)
