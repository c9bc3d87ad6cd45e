"""Copies to a GPU that run while it computes: pinned memory, a stream of their own, and events.

A copy from ordinary (pageable) memory goes through a buffer of the driver and holds up whoever
asked for it. From pinned memory the GPU's copy engine fetches it by itself, beside the kernels of
another stream. Two orders then have to be kept: a kernel waits for the copy of what it reads, and
a copy waits for the kernels that still read what it overwrites
(https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#asynchronous-concurrent-execution).
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Copies(Protocol):
    """How weights get to a device while it computes."""

    def pin(self, host: torch.Tensor) -> bool:
        """Pin memory of the machine; False where the driver refuses, and it stays pageable."""

    def unpin(self, host: torch.Tensor) -> None:
        """Undo :meth:`pin`; no copy from it may be under way."""

    def computed(self) -> Any:
        """An event after all that this thread's computation has been asked for so far."""

    def stream(self, after: Any | None) -> AbstractContextManager[Any]:
        """Within the block, what this thread asks of the device goes to the stream of copies.

        Args:
            after: Nothing of it begins before this event; None waits for nothing.
        """

    def copied(self) -> Any:
        """An event after all that the stream of copies has been asked for so far."""

    def wait(self, event: Any) -> None:
        """Hold up this thread's computation, not the thread, until a copy is done."""

    def finish(self) -> None:
        """Hold up this thread until every copy is done, and all that its computation asked for."""


class CudaCopies:
    """:class:`Copies` of a GPU."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)

    def pin(self, host: torch.Tensor) -> bool:
        """Pin memory where it is: torch's own pinned buffers round up to powers of two.

        Args:
            host: A contiguous tensor of the CPU.
        """
        code = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
        if int(code) == 0:
            return True
        # CUDA tells of this failure once more, at the next kernel: have it told here.
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.zeros(1, device=self._device)
        return False

    def unpin(self, host: torch.Tensor) -> None:
        """Undo :meth:`pin`."""
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())

    def computed(self) -> torch.cuda.Event:
        """An event of the stream that this thread computes on."""
        return torch.cuda.current_stream(self._device).record_event()

    def stream(self, after: torch.cuda.Event | None) -> AbstractContextManager[Any]:
        """Make the stream of copies this thread's own for a block.

        Args:
            after: From :meth:`computed`, or None.
        """
        if after is not None:
            self._stream.wait_event(after)
        return torch.cuda.stream(self._stream)

    def copied(self) -> torch.cuda.Event:
        """An event of the stream of copies."""
        return self._stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the stream that this thread computes on wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        """Wait for the stream of copies, and for the one that this thread computes on."""
        self._stream.synchronize()
        torch.cuda.current_stream(self._device).synchronize()


def usual_copies(device: str) -> Copies | None:
    """A GPU's own way; None for a device that computes what it is asked for in one order."""
    return CudaCopies(device) if device.startswith("cuda") else None
