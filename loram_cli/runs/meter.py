"""Time and peak memory of a stage."""

import ctypes
import gc
import re
import resource
import sys
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Meter:
    """Measures from its creation until :meth:`stop`.

    Memory is the GPU's where one is in use, else the process's resident memory. On Linux the
    kernel's high-water mark is reset at the start, so that a stage is not charged for what ran
    before it in the same process.
    """

    def __init__(self) -> None:
        self._torch = sys.modules.get("torch")
        gc.collect()
        _release_free_memory()
        self._reset = _reset_high_water_mark()
        self._start_bytes = status_bytes("VmRSS") if self._reset else _max_rss_bytes()
        if self._on_gpu():
            self._torch.cuda.reset_peak_memory_stats()
            self._start_bytes = self._torch.cuda.memory_allocated()
        self._started = time.monotonic()

    def stop(self) -> dict[str, float | int]:
        """``wall_seconds``, ``peak_memory_bytes``, ``peak_memory_increase_bytes``."""
        peak_bytes = status_bytes("VmHWM") if self._reset else _max_rss_bytes()
        if self._on_gpu():
            peak_bytes = self._torch.cuda.max_memory_allocated()
        return {
            "wall_seconds": round(time.monotonic() - self._started, 3),
            "peak_memory_bytes": peak_bytes,
            "peak_memory_increase_bytes": max(0, peak_bytes - self._start_bytes),
        }

    def _on_gpu(self) -> bool:
        return self._torch is not None and self._torch.cuda.is_initialized()


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
