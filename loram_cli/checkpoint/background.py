"""Reading ahead and writing behind, so that the disk and the arithmetic work at the same time."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from loram_cli.units import MIB

T = TypeVar("T")

# Pieces under way in each direction: with pieces of a few MiB, tens of MiB in all.
_DEPTH = 4
# Unwritten bytes that the kernel may hold for us. Left alone it collects a tenth of the memory
# and then stalls every process on the machine while it writes that out.
_UNSYNCED_BYTES = 128 * MIB
_END: Any = object()


@contextmanager
def read_ahead(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Draw items in a thread, a few ahead of the one in use.

    While the block runs, torch computes in one thread: on pieces of a few MiB its others would
    spend the processors, which reading and writing need, on waiting for each other.

    Args:
        items: Usually a generator that reads; it runs in the thread alone. What it raises is
            raised where the items are used.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, "read-ahead")

    def drawn() -> Iterator[T]:
        pending = deque(pool.submit(next, iterator, _END) for _ in range(_DEPTH))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, iterator, _END))
            yield item

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield drawn()
    finally:
        torch.set_num_threads(threads)
        pool.shutdown(cancel_futures=True)


class WriteBehind:
    """A new file, written in order by a thread; others hash it and flush it on the way.

    Args:
        file: Created, or emptied.
        drop_cache: Give the written pages back instead of leaving them in the page cache.

    Raises:
        OSError: From any method, for whatever an earlier write ran into.
    """

    def __init__(self, file: Path, *, drop_cache: bool) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._drop_cache = drop_cache
        self._hash = hashlib.sha256()
        self._writes = ThreadPoolExecutor(1, "write-behind")
        self._hashes = ThreadPoolExecutor(1, "hash-behind")
        self._syncs = ThreadPoolExecutor(1, "flush")
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._sync: Future[None] | None = None
        self._unsynced_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append; ``data`` must not change afterwards."""
        written = self._writes.submit(self._append, memoryview(data))
        self._pending.append((written, self._hashes.submit(self._hash.update, data)))
        if len(self._pending) > _DEPTH:
            self._wait()

    def finish(self) -> str:
        """Wait until everything is written, close, and give the SHA-256 in hex."""
        try:
            while self._pending:
                self._wait()
            if self._sync is not None:
                self._sync.result()
        finally:
            self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Drop what is not written yet, then close. A second call does nothing."""
        self._writes.shutdown(cancel_futures=True)
        self._hashes.shutdown(cancel_futures=True)
        self._syncs.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _wait(self) -> None:
        for future in self._pending.popleft():
            future.result()

    def _append(self, data: memoryview) -> None:
        while data.nbytes:
            written = os.write(self._descriptor, data)
            data = data[written:]
            self._unsynced_bytes += written
        if self._unsynced_bytes >= _UNSYNCED_BYTES:
            if self._sync is not None:
                self._sync.result()
            self._sync = self._syncs.submit(self._flush)
            self._unsynced_bytes = 0

    def _flush(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._descriptor)
        if self._drop_cache:
            drop_cache(self._descriptor, 0, 0)


def drop_cache(descriptor: int, offset_bytes: int, count_bytes: int) -> None:
    """Give clean pages of a file back to the system, where it can be asked to.

    Args:
        descriptor: The open file.
        offset_bytes: From where.
        count_bytes: How many; 0 for all to the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset_bytes, count_bytes, os.POSIX_FADV_DONTNEED)


def exceeds_cache(count_bytes: int) -> bool:
    """Whether so many bytes, read or written once, would push everything else out of memory.

    Caching a file larger than the memory gains nothing when it is read from start to end: its
    beginning is gone when it would be read again. A smaller one is left to the next stage.
    """
    return count_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
