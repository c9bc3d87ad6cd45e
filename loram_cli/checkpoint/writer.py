"""Safetensors shards written tensor by tensor, from a list of shapes known beforehand."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from loram_cli.checkpoint.index import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME
from loram_cli.errors import LoramError

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardedWriter:
    """Writes planned tensors in their order; the headers go first, so nothing is held back.

    Args:
        directory: Where the shards go.
        plan: Every tensor, in the order in which :meth:`write` will be called.
        max_shard_bytes: Upper bound on a shard's tensors (a single larger tensor has its own).
    """

    def __init__(
        self,
        directory: Path,
        plan: Mapping[str, TensorPlan],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._directory = directory
        self._plan = dict(plan)
        self._shards = _split(self._plan, max_shard_bytes)
        self._files = _shard_names(len(self._shards))
        self._pending = [(s, name) for s, names in enumerate(self._shards) for name in names]
        self._stream: BinaryIO | None = None
        self._open_shard = -1

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if kind is None:
            if self._pending:
                raise RuntimeError(f"planned but never written: {self._pending[0][1]}")
            self._write_index()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next planned tensor.

        Raises:
            LoramError: The tensor has NaN or infinite values, or the disk is full.
        """
        shard, planned = self._pending.pop(0)
        want = self._plan[planned]
        if name != planned or tensor.dtype != want.dtype or tuple(tensor.shape) != want.shape:
            raise RuntimeError(f"{name}: does not match the plan for {planned}: {want}")
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not tensor.isfinite().all():
            raise LoramError(
                f"tensor {name} has NaN or infinite values", "the checkpoint is damaged"
            )
        try:
            if shard != self._open_shard:
                self._start_shard(shard)
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            assert self._stream is not None
            self._stream.write(memoryview(data))
        except OSError as error:
            raise LoramError(f"{self._directory}: cannot write ({error.strerror})") from error

    def _start_shard(self, shard: int) -> None:
        if self._stream is not None:
            self._stream.close()
        # Unbuffered: tensors are large, and a second copy would double the peak.
        self._stream = (self._directory / self._files[shard]).open("wb", buffering=0)
        self._open_shard = shard
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[shard]:
            plan = self._plan[name]
            header[name] = {
                "dtype": DTYPE_NAMES[plan.dtype],
                "shape": list(plan.shape),
                "data_offsets": [offset, offset + plan.num_bytes],
            }
            offset += plan.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        # safetensors aligns the data to 8 bytes with trailing spaces in the header.
        text += b" " * (-len(text) % 8)
        self._stream.write(len(text).to_bytes(8, "little") + text)

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
