"""Safetensors shards written in order, from a list of shapes known beforehand."""

import errno
import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from loram_cli.checkpoint.background import WriteBehind
from loram_cli.checkpoint.finite import is_finite
from loram_cli.checkpoint.header import DTYPES, Piece, TensorEntry
from loram_cli.checkpoint.index import INDEX_NAME, SINGLE_NAME
from loram_cli.errors import LoramError

MAX_SHARD_BYTES = 5 * 10**9
# No space, over the quota, over the largest file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DTYPE_NAMES = {dtype.to_torch(): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its type, its shape, and what the file holds in its place.

    Attributes:
        dtype: Of the tensor.
        shape: Of the tensor.
        pieces: As those of :class:`.TensorEntry`; empty for the tensor itself.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def like(cls, entry: TensorEntry) -> "TensorPlan":
        """The plan of a copy of a stored tensor."""
        return cls(entry.dtype.to_torch(), entry.shape, entry.pieces)

    def stored(self, name: str) -> "dict[str, TensorPlan]":
        """What the file holds for the tensor of this name, in the order of writing."""
        if not self.pieces:
            return {name: self}
        if "*" not in self.pieces[0].name:
            return {self.pieces[0].name: TensorPlan(self.dtype, self.shape)}
        return {
            piece.name.replace("*", str(i)): TensorPlan(self.dtype, (piece.rows, *self.shape[2:]))
            for i in range(self.shape[0])
            for piece in self.pieces
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardedWriter:
    """Writes planned tensors in their order; the headers go first, so nothing is held back.

    Args:
        directory: Where the shards go.
        plan: Every tensor, in the order in which it will be written.
        max_shard_bytes: Upper bound on a shard's tensors (a single larger tensor has its own).

    Attributes:
        digests: SHA-256 in hex by file name, of every shard that is finished.
    """

    def __init__(
        self,
        directory: Path,
        plan: Mapping[str, TensorPlan],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._directory = directory
        self._stacks = {
            name: tensor
            for name, tensor in plan.items()
            if tensor.pieces and "*" in tensor.pieces[0].name
        }
        self._names = {n: p.pieces[0].name for n, p in plan.items() if p.pieces}
        self._plan = {
            stored: tensor
            for name, asked in plan.items()
            for stored, tensor in asked.stored(name).items()
        }
        self._shards = _split(self._plan, max_shard_bytes)
        self._files = _shard_names(len(self._shards))
        self._pending = deque((s, name) for s, names in enumerate(self._shards) for name in names)
        self.digests: dict[str, str] = {}
        self._done_bytes = 0
        self._stack_done: dict[str, int] = {}
        self._file: WriteBehind | None = None
        self._open_shard = -1

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.close()
            return
        try:
            self._finish_shard()
        except OSError as error:
            raise self._cannot_write(error) from error
        if self._pending:
            raise RuntimeError(f"planned but never written: {self._pending[0][1]}")
        self._write_index()

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Append to the next planned tensor: all of it, or its next rows.

        The rows are copied at once and written in the background.

        Args:
            name: The tensor's name; must be the plan's next until all of it is there.
            rows: The tensor, or consecutive rows of it.

        Raises:
            LoramError: There are NaN or infinite values, or the disk is full.
        """
        stack = self._stacks.get(name)
        if stack is None:
            self._write(self._names.get(name, name), rows)
            return
        done = self._stack_done.get(name, 0)
        widths = [piece.rows for piece in stack.pieces]
        if rows.shape[1:] != stack.shape[1:] or done + len(rows) > stack.shape[0]:
            raise RuntimeError(f"{name}: does not match the plan: {stack}")
        for i, whole in enumerate(rows, start=done):
            for piece, part in zip(stack.pieces, whole.split(widths), strict=True):
                self._write(piece.name.replace("*", str(i)), part)
        self._stack_done[name] = done + len(rows)

    def _write(self, name: str, rows: torch.Tensor) -> None:
        """Append to the next planned tensor of the file."""
        shard, planned = self._pending[0]
        want = self._plan[planned]
        left_bytes = want.num_bytes - self._done_bytes
        fits = rows.dtype == want.dtype and rows.shape[1:] == want.shape[1:]
        if name != planned or not fits or rows.nbytes > left_bytes:
            raise RuntimeError(f"{name}: does not match the plan for {planned}: {want}")
        if not is_finite(rows):
            raise LoramError(
                f"tensor {name} has NaN or infinite values",
                "what was computed for it may be beyond what "
                f"{str(rows.dtype).removeprefix('torch.')} holds",
            )
        try:
            if shard != self._open_shard:
                self._start_shard(shard)
            assert self._file is not None
            self._file.write(rows.contiguous().reshape(-1).view(torch.uint8))
        except OSError as error:
            raise self._cannot_write(error) from error
        self._done_bytes += rows.nbytes
        if self._done_bytes == want.num_bytes:
            self._pending.popleft()
            self._done_bytes = 0

    def _start_shard(self, shard: int) -> None:
        self._finish_shard()
        shard_bytes = sum(self._plan[name].num_bytes for name in self._shards[shard])
        self._file = WriteBehind(self._directory / self._files[shard], shard_bytes)
        self._open_shard = shard
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[shard]:
            plan = self._plan[name]
            header[name] = {
                "dtype": _DTYPE_NAMES[plan.dtype],
                "shape": list(plan.shape),
                "data_offsets": [offset, offset + plan.num_bytes],
            }
            offset += plan.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        # safetensors aligns the data to 8 bytes with trailing spaces in the header.
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        self._file.write(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def _finish_shard(self) -> None:
        if self._file is not None:
            self.digests[self._files[self._open_shard]] = self._file.finish()

    def _cannot_write(self, error: OSError) -> LoramError:
        return LoramError(
            f"{self._directory}: cannot write ({error.strerror})",
            "free some space, or pass --out on another disk" if error.errno in _FULL else None,
        )

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        weight_map = {
            n: f for f, names in zip(self._files, self._shards, strict=True) for n in names
        }
        total_bytes = sum(plan.num_bytes for plan in self._plan.values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")


def _split(plan: Mapping[str, TensorPlan], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in plan.items():
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
