"""How much memory a device has left."""

import contextlib
from pathlib import Path

import torch

from loram_cli.checkpoint.direct_io import usable_memory_bytes
from loram_cli.runs.meter import status_bytes
from loram_cli.units import KIB


def free_memory_bytes(device: torch.device | str) -> int:
    """Memory that this process can still take.

    Args:
        device: A GPU, of which torch's own reserve counts as free; anything else is the machine.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free_bytes + kept
    # A limit of this process may be lower than what the machine has left.
    allowed = max(0, usable_memory_bytes() - _resident_bytes())
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(allowed, int(line.split()[1]) * KIB)
    return allowed // 2


def _resident_bytes() -> int:
    with contextlib.suppress(OSError):
        return status_bytes("VmRSS")
    return 0
