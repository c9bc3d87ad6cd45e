"""Time and peak memory of a stage."""

import ctypes
import gc
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Time and memory of a stage."""

    wall_seconds: float
    peak_memory_bytes: int
    peak_memory_increase_bytes: int


class Meter:
    """Measures from its creation until :meth:`stop`.

    Memory is the GPU's where one is in use, else the process's resident memory. On Linux the
    kernel's high-water mark is reset at the start, so that a stage is not charged for what ran
    before it in the same process.
    """

    def __init__(self) -> None:
        gc.collect()
        _release_free_memory()
        self._reset = _reset_high_water_mark()
        self._start_bytes = status_bytes("VmRSS") if self._reset else _max_rss_bytes()
        self._gpu = _gpu_in_use()
        if self._gpu is not None:
            self._gpu.reset_peak_memory_stats()
            self._start_bytes = self._gpu.memory_allocated()
        self._started = time.monotonic()

    def stop(self) -> Measured:
        """The figures since the beginning."""
        peak_bytes = status_bytes("VmHWM") if self._reset else _max_rss_bytes()
        gpu = self._gpu or _gpu_in_use()
        if gpu is not None:
            peak_bytes = gpu.max_memory_allocated()
        return Measured(
            wall_seconds=round(time.monotonic() - self._started, 3),
            peak_memory_bytes=peak_bytes,
            peak_memory_increase_bytes=max(0, peak_bytes - self._start_bytes),
        )


def _gpu_in_use() -> Any:
    """The module of torch for the GPU that this process uses; torch is not loaded for it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def status_bytes(field: str) -> int:
    """A field of this process's status, such as ``VmRSS``; 0 where there is none."""
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _max_rss_bytes() -> int:
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def _release_free_memory() -> None:
    # glibc keeps freed memory; without this the start would be too high and the increase too low.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
