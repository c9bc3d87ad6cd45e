"""Reading ahead and writing behind, so that the disk and the arithmetic work at the same time."""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from loram_cli.checkpoint.direct_io import (
    BLOCK_BYTES,
    LEAST_BYTES,
    block_buffer,
    buffer_again,
    stop_buffering,
)
from loram_cli.units import MIB

T = TypeVar("T")

# Pieces under way in each direction: with pieces of a few MiB, tens of MiB in all.
_DEPTH = 4
_PIECE_BYTES = 4 * MIB
# Unwritten bytes that the kernel may hold for us. Unchecked, it collects a tenth of the memory
# and then stalls every process on the machine while it writes that out.
_UNSYNCED_BYTES = 128 * MIB
_END: Any = object()


@contextmanager
def read_ahead(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Draw items in a thread, a few ahead of the one in use.

    While the block runs, torch computes in one thread, see :func:`one_torch_thread`.

    Args:
        items: Usually a generator that reads; it runs only in the thread. What it raises is
            raised where the items are used.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, "read-ahead")

    def drawn() -> Iterator[T]:
        pending = deque(pool.submit(next, iterator, _END) for _ in range(_DEPTH))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, iterator, _END))
            yield item

    try:
        with one_torch_thread():
            yield drawn()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch computes in one thread while the block runs.

    On pieces of a few MiB its others would spend the processors, which reading and writing need,
    on waiting for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class WriteBehind:
    """A new file, written in order by a thread; another one hashes it.

    Args:
        file: Created, or emptied.
        count_bytes: About how long it will be: a large file is written past the page cache.

    Raises:
        OSError: From any method, for whatever an earlier write ran into.
    """

    def __init__(self, file: Path, count_bytes: int) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._unbuffered = count_bytes >= LEAST_BYTES and stop_buffering(self._descriptor)
        self._hash = hashlib.sha256()
        self._writes = ThreadPoolExecutor(1, "write-behind")
        self._hashes = ThreadPoolExecutor(1, "hash-behind")
        self._pending: deque[tuple[torch.Tensor, Future[None], Future[None]]] = deque()
        self._spare: list[torch.Tensor] = []
        self._piece = block_buffer(_PIECE_BYTES)
        self._filled = 0
        self._unsynced_bytes = 0

    def write(self, data: torch.Tensor) -> None:
        """Append bytes; they are copied at once.

        Args:
            data: uint8, shape (n,).
        """
        while data.numel():
            part = data[: _PIECE_BYTES - self._filled]
            self._piece[self._filled : self._filled + part.numel()] = part
            self._filled += part.numel()
            data = data[part.numel() :]
            if self._filled == _PIECE_BYTES:
                self._send()

    def finish(self) -> str:
        """Wait until everything is on the disk, close, and give the SHA-256 in hex."""
        try:
            if self._filled:
                self._send()
            while self._pending:
                self._wait()
            os.fsync(self._descriptor)
        finally:
            self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Drop what is not written yet, then close. A second call does nothing."""
        self._writes.shutdown(cancel_futures=True)
        self._hashes.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _send(self) -> None:
        """Hand the piece over to the threads, and take an empty one."""
        view = self._piece.numpy().data[: self._filled]
        written = self._writes.submit(self._append, view)
        self._pending.append((self._piece, written, self._hashes.submit(self._hash.update, view)))
        if len(self._pending) > _DEPTH:
            self._wait()
        self._piece = self._spare.pop() if self._spare else block_buffer(_PIECE_BYTES)
        self._filled = 0

    def _wait(self) -> None:
        piece, *futures = self._pending.popleft()
        for future in futures:
            future.result()
        self._spare.append(piece)

    def _append(self, data: memoryview) -> None:
        if self._unbuffered and data.nbytes % BLOCK_BYTES:
            self._buffer()
        while data.nbytes:
            try:
                written = os.write(self._descriptor, data)
            except OSError as error:
                # Some file systems take the flag, and refuse the transfer.
                if error.errno != errno.EINVAL or not self._unbuffered:
                    raise
                self._buffer()
                continue
            data = data[written:]
            self._unsynced_bytes += 0 if self._unbuffered else written
            # A short write can end inside a block.
            if self._unbuffered and written % BLOCK_BYTES:
                self._buffer()
        if self._unsynced_bytes >= _UNSYNCED_BYTES:
            getattr(os, "fdatasync", os.fsync)(self._descriptor)
            self._unsynced_bytes = 0

    def _buffer(self) -> None:
        buffer_again(self._descriptor)
        self._unbuffered = False
