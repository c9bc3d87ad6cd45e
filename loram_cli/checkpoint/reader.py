"""Tensors read whole or a few rows at a time, without mapping the file."""

import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from types import TracebackType

import torch

from loram_cli.checkpoint.direct_io import (
    BLOCK_BYTES,
    LEAST_BYTES,
    BufferPool,
    block_buffer,
    block_ceiling,
    block_floor,
    exceeds_cache,
    is_cached,
    stop_buffering,
)
from loram_cli.checkpoint.finite import check_finite
from loram_cli.checkpoint.header import TensorEntry
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.checkpoint.low_bit import PackedEntry
from loram_cli.checkpoint.low_bit_codes import row_scales, weight_of
from loram_cli.checkpoint.mxfp4 import Mxfp4Entry
from loram_cli.checkpoint.mxfp4_codes import dequantize
from loram_cli.errors import LoramError
from loram_cli.units import KIB, MIB

# Few enough for a processor's cache, where arithmetic on them is several times faster, and for
# the allocator to use the same memory again.
# Together with the rest of its first and last block it fills two large pages.
CHUNK_BYTES = 4 * MIB - 2 * BLOCK_BYTES
# Unwanted bytes between wanted ones that cost less to read than a second request.
_GAP_BYTES = 256 * KIB
# Requests under way, so that the disk has another one when it has answered one.
_REQUESTS = 2


class TensorReader:
    """Reads tensors of an index. Use as a context manager; shards are opened once.

    Args:
        index: Which tensor is where.
        once: Nothing will be read a second time soon, so that the page cache is of no use.
        often: Parts will be read over and over, so that the page cache is to have them, however
            large the whole is.
        finite: Refuse what has NaN or infinity.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        *,
        once: bool = False,
        often: bool = False,
        finite: bool = True,
    ) -> None:
        self.index = index
        self._finite = finite
        self._files: dict[str, _OpenFile] = {}
        self._opening = Lock()  # transformers reads by several threads
        self._buffers = BufferPool(CHUNK_BYTES + 2 * BLOCK_BYTES)
        self._reads = ThreadPoolExecutor(_REQUESTS, "read")
        self._unbuffered = not often and (once or exceeds_cache(index.num_bytes))

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reads.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, as stored; a weight of few bits as floating numbers.

        Raises:
            LoramError: The shard ends early, or there are NaN or infinite values.
        """
        entry = self.index.tensors[name]
        if entry.parts:
            return self._load_stack(entry, range(entry.shape[0]))
        return self._load(entry, 0, entry.shape)

    def read_packed(self, name: str) -> torch.Tensor:
        """The bytes of a weight of few bits, uint8, shape (rows, row_bytes).

        Raises:
            LoramError: The shard ends early, or there are NaN or infinite values.
        """
        entry = self.index.tensors[name]
        assert isinstance(entry, PackedEntry)
        return self._load_packed(entry, 0, entry.stored.shape[0])

    def read_chunks(
        self, name: str, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor's rows (indices along axis 0) in order, some MiB at a time.

        Args:
            name: Tensor name.
            rows: Sorted indices of the rows to read; None for all.

        Yields:
            How many wanted rows went before, and the next ones, shape ``(n, *shape[1:])``; for a
            scalar or an empty tensor, the tensor itself.

        Raises:
            LoramError: The shard ends early, or there are NaN or infinite values.
        """
        entry = self.index.tensors[name]
        if entry.num_bytes == 0 or not entry.shape:
            yield 0, self.read(name)
            return
        wanted = range(entry.shape[0]) if rows is None else rows
        if entry.parts:
            yield from self._stacks_ahead(entry, wanted)
            return
        row_bytes = entry.num_bytes // entry.shape[0]
        done = 0
        for start, stop, chunk in self._spans_ahead(entry, _spans(wanted, row_bytes)):
            if rows is not None:
                here = rows[done : bisect_left(rows, stop, done)]
                if len(here) < stop - start:
                    # Not index_select, which knows no unsigned numbers of two bytes and more.
                    chunk = chunk[torch.tensor(here) - start]
            yield done, chunk
            done += chunk.shape[0]

    def _spans_ahead(
        self, entry: TensorEntry, spans: Iterator[tuple[int, int]]
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Each span of rows and its tensor; the next ones are read while one is in use."""
        row_bytes = entry.num_bytes // entry.shape[0]
        self._open(entry)

        def load(start: int, stop: int) -> tuple[int, int, torch.Tensor]:
            shape = (stop - start, *entry.shape[1:])
            return start, stop, self._load(entry, start * row_bytes, shape, self._buffers)

        pending = deque(self._reads.submit(load, *span) for span in islice(spans, _REQUESTS))
        while pending:
            yield pending.popleft().result()
            pending.extend(self._reads.submit(load, *span) for span in islice(spans, 1))

    def _stacks_ahead(
        self, entry: TensorEntry, wanted: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Wanted indices of a tensor that is stored in parts, some MiB at a time, or one."""
        count = max(1, CHUNK_BYTES // (entry.num_bytes // entry.shape[0]))
        spans = iter([wanted[i : i + count] for i in range(0, len(wanted), count)])
        for part in (part for parts in entry.parts for part in parts):
            self._open(part)
        pending = deque(
            self._reads.submit(self._load_stack, entry, span) for span in islice(spans, 1)
        )
        done = 0
        while pending:
            chunk = pending.popleft().result()
            # One ahead: the parts of an expert can be hundreds of MiB.
            pending.extend(
                self._reads.submit(self._load_stack, entry, span) for span in islice(spans, 1)
            )
            yield done, chunk
            done += chunk.shape[0]

    def _load_stack(self, entry: TensorEntry, indices: Sequence[int]) -> torch.Tensor:
        """Some indices of a tensor that is stored in parts, shape (n, *shape[1:])."""
        stack = torch.empty((len(indices), *entry.shape[1:]), dtype=entry.dtype.to_torch())
        if isinstance(entry, Mxfp4Entry):
            for place, index in enumerate(indices):
                pair = [self._load_index(part, index) for part in entry.parts[0]]
                stack[place] = dequantize(pair[0], pair[1], stack.dtype).T
            return self._checked(entry, stack)
        for place, index in enumerate(indices):
            start = 0
            for part in entry.parts[index]:
                stop = start + part.shape[0]
                stack[place, start:stop] = self._load(part, 0, part.shape)
                start = stop
        return stack

    def _load_index(self, entry: TensorEntry, index: int) -> torch.Tensor:
        """One index of a stored tensor's first axis, shape shape[1:]."""
        step_bytes = entry.num_bytes // entry.shape[0]
        return self._load(entry, index * step_bytes, entry.shape[1:])

    def _load(
        self,
        entry: TensorEntry,
        start: int,
        shape: tuple[int, ...],
        buffers: BufferPool | None = None,
    ) -> torch.Tensor:
        """A tensor of the entry's type from the bytes after ``start``."""
        if isinstance(entry, PackedEntry):
            stored = self._load_packed(entry, start, shape[0], buffers)
            return weight_of(stored, entry.low_bit, shape[1], entry.dtype.to_torch())
        dtype = entry.dtype.to_torch()
        count_bytes = math.prod(shape) * dtype.itemsize
        if count_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        raw = self._raw(entry, entry.offset_bytes + start, count_bytes, buffers)
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        return self._checked(entry, raw.view(dtype).reshape(shape))

    def _load_packed(
        self, entry: PackedEntry, start: int, rows: int, buffers: BufferPool | None = None
    ) -> torch.Tensor:
        """Rows of bytes after the first ``start`` bytes."""
        stored = self._load(entry.stored, start, (rows, entry.stored.shape[1]), buffers)
        self._checked(entry, row_scales(stored))
        return stored

    def _checked(self, entry: TensorEntry, tensor: torch.Tensor) -> torch.Tensor:
        if self._finite:
            check_finite(entry.file, entry.name, tensor)
        return tensor

    def _raw(
        self,
        entry: TensorEntry,
        offset_bytes: int,
        count_bytes: int,
        buffers: BufferPool | None = None,
    ) -> torch.Tensor:
        """Bytes of the entry's file, uint8, shape (count_bytes,)."""
        file = self._open(entry)
        begin = block_floor(offset_bytes) if file.unbuffered else offset_bytes
        wanted_bytes = offset_bytes + count_bytes - begin
        if buffers is not None and wanted_bytes <= buffers.count_bytes:
            buffer = buffers.take()
        else:
            buffer = block_buffer(wanted_bytes)
        asked_bytes = block_ceiling(wanted_bytes) if file.unbuffered else wanted_bytes
        view = buffer.numpy().data[:asked_bytes]
        done_bytes = 0
        while done_bytes < wanted_bytes:
            try:
                got = os.preadv(file.descriptor, [view[done_bytes:]], begin + done_bytes)
            except OSError as error:
                raise LoramError(f"{entry.file}: cannot be read ({error.strerror})") from error
            done_bytes += got
            ended = got == 0 or (file.unbuffered and got % BLOCK_BYTES)
            if ended and done_bytes < wanted_bytes:
                raise LoramError(f"{entry.file}: ends inside tensor {entry.name}")
        return buffer[offset_bytes - begin : wanted_bytes]

    def _open(self, entry: TensorEntry) -> "_OpenFile":
        key = str(entry.file)
        with self._opening:
            if key not in self._files:
                try:
                    descriptor = os.open(entry.file, os.O_RDONLY)
                except OSError as error:
                    raise LoramError(f"{entry.file}: cannot be read ({error.strerror})") from error
                self._files[key] = _past_the_cache(descriptor, self._unbuffered)
            return self._files[key]


@dataclass(frozen=True)
class _OpenFile:
    descriptor: int
    unbuffered: bool


def _past_the_cache(descriptor: int, wanted: bool) -> _OpenFile:
    """The open file, for unbuffered reads where asked for and possible."""
    large = os.fstat(descriptor).st_size >= LEAST_BYTES
    unbuffered = wanted and large and not is_cached(descriptor) and stop_buffering(descriptor)
    return _OpenFile(descriptor, unbuffered)


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
