"""Tensors read whole or a few rows at a time, without mapping the file."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch

from loram_cli.checkpoint.background import drop_cache, exceeds_cache
from loram_cli.checkpoint.index import CheckpointIndex, TensorEntry
from loram_cli.errors import LoramError
from loram_cli.units import KIB, MIB

# Few enough for a processor's cache, where arithmetic on them is several times faster, and for
# the allocator to use the same memory again.
CHUNK_BYTES = 4 * MIB
# Unwanted bytes between wanted ones that cost less to read than a second request.
_GAP_BYTES = 256 * KIB


class TensorReader:
    """Reads tensors of an index. Use as a context manager; shards are opened once."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._descriptors: dict[str, int] = {}
        self._drop_cache = exceeds_cache(index.num_bytes)

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, as stored.

        Raises:
            LoramError: The shard ends early.
        """
        entry = self.index.tensors[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._fill(entry, entry.offset_bytes, tensor)
        return tensor

    def read_chunks(
        self, name: str, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor's rows (indices along axis 0) in order, some MiB at a time.

        Args:
            name: Tensor name.
            rows: Sorted indices of the rows that are wanted; None for all.

        Yields:
            How many wanted rows went before, and the next ones, shape ``(n, *shape[1:])``; for a
            scalar or an empty tensor, the tensor itself.

        Raises:
            LoramError: The shard ends early.
        """
        entry = self.index.tensors[name]
        if entry.num_bytes == 0 or not entry.shape:
            yield 0, self.read(name)
            return
        row_bytes = entry.num_bytes // entry.shape[0]
        wanted = range(entry.shape[0]) if rows is None else rows
        done = 0
        for start, stop in _spans(wanted, row_bytes):
            chunk = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
            self._fill(entry, entry.offset_bytes + start * row_bytes, chunk)
            if rows is not None:
                here = rows[done : bisect_left(rows, stop, done)]
                if len(here) < stop - start:
                    chunk = chunk.index_select(0, torch.tensor(here) - start)
            yield done, chunk
            done += chunk.shape[0]

    def read_bytes(self, entry: TensorEntry, start: int, count_bytes: int) -> bytes:
        """``count_bytes`` raw bytes from ``start`` inside the tensor."""
        return os.pread(self._descriptor(entry), count_bytes, entry.offset_bytes + start)

    def _fill(self, entry: TensorEntry, offset_bytes: int, out: torch.Tensor) -> None:
        if out.numel() == 0:
            return
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        descriptor = self._descriptor(entry)
        while view.nbytes:
            try:
                got = os.preadv(descriptor, [view], offset_bytes)
            except OSError as error:
                raise LoramError(f"{entry.file}: cannot be read ({error.strerror})") from error
            if got == 0:
                raise LoramError(f"{entry.file}: ends inside tensor {entry.name}")
            if self._drop_cache:
                drop_cache(descriptor, offset_bytes, got)
            view, offset_bytes = view[got:], offset_bytes + got

    def _descriptor(self, entry: TensorEntry) -> int:
        key = str(entry.file)
        if key not in self._descriptors:
            try:
                self._descriptors[key] = os.open(entry.file, os.O_RDONLY)
            except OSError as error:
                raise LoramError(f"{entry.file}: cannot be read ({error.strerror})") from error
        return self._descriptors[key]


def _spans(rows: Sequence[int], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of rows to read at once: all wanted ones, and little in between."""
    most_rows = max(1, CHUNK_BYTES // row_bytes)
    gap_rows = _GAP_BYTES // row_bytes
    if isinstance(rows, range):
        for start in range(rows.start, rows.stop, most_rows):
            yield start, min(start + most_rows, rows.stop)
        return
    start = stop = rows[0] if rows else 0
    for row in rows:
        if row - stop > gap_rows or row - start >= most_rows:
            yield start, stop
            start = row
        stop = row + 1
    if stop > start:
        yield start, stop
