"""Hidden states at layer boundaries: in memory up to a budget, else in files."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loram_cli.errors import LoramError
from loram_cli.modeling.load import slow_in_bf16


def computed_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The type to run a checkpoint in: bf16 as it is where that is fast, all else in fp32.

    In fp16 small gradients underflow, and one layer at a time is cheap to raise.

    Args:
        stored: The type of its weights.
        device: Where it runs.
    """
    as_stored = stored == torch.bfloat16 and not slow_in_bf16(device)
    return torch.bfloat16 if as_stored else torch.float32


class Boundary:
    """Hidden states of all calibration windows at one layer boundary.

    Args:
        shape: (samples, length, hidden).
        dtype: Element type.
        file: Where they lie; None holds them in memory.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, file: Path | None) -> None:
        self.shape = shape
        self.dtype = dtype
        self.num_bytes = math.prod(shape) * dtype.itemsize
        self.file = file
        self._memory = torch.empty(shape, dtype=dtype) if file is None else None
        self._descriptor = None if file is None else os.open(file, os.O_RDWR | os.O_CREAT, 0o600)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Windows ``start`` to ``stop`` (or the last), a copy of shape (n, length, hidden)."""
        if self._memory is not None:
            return self._memory[start:stop].clone()
        out = torch.empty((min(stop, self.shape[0]) - start, *self.shape[1:]), dtype=self.dtype)
        self._transfer(os.preadv, out, start)
        return out

    def write(self, start: int, hidden: torch.Tensor) -> None:
        """Put windows from ``start`` on.

        Raises:
            LoramError: The disk is full.
        """
        hidden = hidden.detach().to("cpu", self.dtype)
        if self._memory is not None:
            self._memory[start : start + len(hidden)] = hidden
        else:
            self._transfer(os.pwritev, hidden.contiguous(), start)

    def close(self) -> None:
        """Drop them."""
        self._memory = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            assert self.file is not None
            self.file.unlink(missing_ok=True)

    def _transfer(self, move: Callable[..., int], tensor: torch.Tensor, start: int) -> None:
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        offset_bytes = start * (self.num_bytes // self.shape[0])
        while view.nbytes:
            try:
                moved = move(self._descriptor, [view], offset_bytes)
            except OSError as error:
                raise LoramError(
                    f"{self.file}: activations cannot be kept on disk ({error.strerror})",
                    "raise --calibration-memory, or lower --calibration-samples",
                ) from error
            if moved == 0:
                raise LoramError(f"{self.file}: activations cannot be read back")
            view, offset_bytes = view[moved:], offset_bytes + moved


class BoundaryPool:
    """Makes boundaries, and drops what is left of them at the end.

    Args:
        shape: (samples, length, hidden) of every boundary.
        dtype: Their element type.
        budget_bytes: Memory for all of them together; what exceeds it goes to files.
        directory: Where the files go; made when the first one is needed.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        budget_bytes: int,
        directory: Path,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.free_bytes = budget_bytes
        self.directory = directory
        self.disk_bytes = 0
        self._open: list[Boundary] = []
        self._made = 0

    def __enter__(self) -> "BoundaryPool":
        return self

    def __exit__(self, *error: Any) -> None:
        for boundary in list(self._open):
            self.release(boundary)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def new(self) -> Boundary:
        """An empty boundary, in memory if there is room in the budget."""
        needed = math.prod(self.shape) * self.dtype.itemsize
        file = None
        if needed > self.free_bytes:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self.directory / f"boundary-{self._made}"
            self.disk_bytes += needed
        else:
            self.free_bytes -= needed
        self._made += 1
        boundary = Boundary(self.shape, self.dtype, file)
        self._open.append(boundary)
        return boundary

    def release(self, boundary: Boundary) -> None:
        """Drop a boundary, and give its memory back to the budget."""
        if boundary.file is None:
            self.free_bytes += boundary.num_bytes
        boundary.close()
        self._open.remove(boundary)
