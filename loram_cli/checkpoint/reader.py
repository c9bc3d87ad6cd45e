"""Tensors read one at a time, or only the rows that are wanted, without mapping the file."""

import os
from collections.abc import Sequence
from types import TracebackType

import torch

from loram_cli.checkpoint.index import CheckpointIndex, TensorEntry
from loram_cli.errors import LoramError


class TensorReader:
    """Reads tensors of an index. Use as a context manager; shards are opened once."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._descriptors: dict[str, int] = {}

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

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Only some rows (indices along axis 0), in ascending order; the rest is not read.

        Args:
            name: Tensor name.
            rows: Sorted row indices.

        Returns:
            Shape ``(len(rows), *shape[1:])``.

        Raises:
            LoramError: The shard ends early.
        """
        entry = self.index.tensors[name]
        tensor = torch.empty((len(rows), *entry.shape[1:]), dtype=entry.dtype)
        row_bytes = entry.num_bytes // entry.shape[0]
        done = 0
        for start, stop in contiguous_runs(rows):
            count = stop - start
            self._fill(entry, entry.offset_bytes + start * row_bytes, tensor[done : done + count])
            done += count
        return tensor

    def read_bytes(self, entry: TensorEntry, start: int, count_bytes: int) -> bytes:
        """``count_bytes`` raw bytes from ``start`` inside the tensor."""
        return os.pread(self._descriptor(entry), count_bytes, entry.offset_bytes + start)

    def _fill(self, entry: TensorEntry, offset_bytes: int, out: torch.Tensor) -> None:
        if out.numel() == 0:
            return
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        descriptor = self._descriptor(entry)
        while view.nbytes:
            got = os.preadv(descriptor, [view], offset_bytes)
            if got == 0:
                raise LoramError(f"{entry.file}: ends inside tensor {entry.name}")
            view, offset_bytes = view[got:], offset_bytes + got

    def _descriptor(self, entry: TensorEntry) -> int:
        key = str(entry.file)
        if key not in self._descriptors:
            self._descriptors[key] = os.open(entry.file, os.O_RDONLY)
        return self._descriptors[key]


def contiguous_runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open runs of consecutive integers, e.g. ``[0, 1, 4] -> [(0, 2), (4, 5)]``."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
