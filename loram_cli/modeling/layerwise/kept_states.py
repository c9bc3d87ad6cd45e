"""Hidden states of micro-batches at layer boundaries, or their gradients, until they are needed."""

import os
import tempfile
from pathlib import Path
from typing import Literal

import torch

from loram_cli.errors import LoramError

Place = Literal["device", "host"] | Path
"""Where hidden states are kept: where they are computed, in the machine's memory, or in a file."""


class KeptStates:
    """Keeps tensors by boundary and micro-batch. Use as a context manager.

    Args:
        place: ``device``; ``host``, pinned beside a GPU; or a directory for a file without a name,
            which is gone with the process.
        device: Where tensors come from and go back to.
    """

    def __init__(self, place: Place, device: torch.device) -> None:
        self._device = device
        self._memory: dict[tuple[int, int], torch.Tensor] = {}
        self._file = _StateFile(place) if isinstance(place, Path) else None
        self._pinned = place == "host" and device.type == "cuda"

    def put(self, boundary: int, micro_batch: int, hidden: torch.Tensor) -> None:
        """Keep a tensor, in the place of the one that is kept there.

        Raises:
            LoramError: The disk is full.
        """
        key = boundary, micro_batch
        if self._file is not None:
            self._file.write(key, hidden.cpu())
            return
        if self._pinned:
            there = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            hidden = there.copy_(hidden, non_blocking=True)
        self._memory[key] = hidden

    def take(self, boundary: int, micro_batch: int, *, keep: bool = False) -> torch.Tensor:
        """What is kept there, on the device; it is given up unless ``keep``."""
        key = boundary, micro_batch
        if self._file is not None:
            return self._file.read(key).to(self._device)
        kept = self._memory[key] if keep else self._memory.pop(key)
        return kept.to(self._device, non_blocking=True)

    def clear(self) -> None:
        """Give up everything; a file keeps its room for the next step."""
        self._memory.clear()

    def close(self) -> None:
        """Give up everything, the file's room as well."""
        self.clear()
        if self._file is not None:
            self._file.close()


class _StateFile:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._descriptor, name = tempfile.mkstemp(dir=directory)
        Path(name).unlink()
        # Where each one lies, and for how many bytes there is room.
        self._rooms: dict[tuple[int, int], tuple[int, int]] = {}
        self._kinds: dict[tuple[int, int], tuple[torch.Size, torch.dtype]] = {}
        self._end = 0

    def write(self, key: tuple[int, int], tensor: torch.Tensor) -> None:
        offset, room = self._rooms.get(key, (0, -1))
        if tensor.nbytes > room:
            offset, room = self._rooms[key] = self._end, tensor.nbytes
            self._end += tensor.nbytes
        self._kinds[key] = tensor.shape, tensor.dtype
        view = _bytes_of(tensor.detach().contiguous())
        while view.nbytes:
            try:
                done = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                raise LoramError(
                    f"{self._directory}: activations cannot be kept on disk ({error.strerror})",
                    "free disk space, or lower --batch",
                ) from error
            view, offset = view[done:], offset + done

    def read(self, key: tuple[int, int]) -> torch.Tensor:
        shape, dtype = self._kinds[key]
        tensor = torch.empty(shape, dtype=dtype)
        view, offset = _bytes_of(tensor), self._rooms[key][0]
        while view.nbytes:
            done = os.preadv(self._descriptor, [view], offset)
            if not done:
                raise LoramError(f"{self._directory}: activations cannot be read back")
            view, offset = view[done:], offset + done
        return tensor

    def close(self) -> None:
        os.close(self._descriptor)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
