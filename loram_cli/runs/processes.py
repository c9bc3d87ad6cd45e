"""Which of several processes this one is, as ``torchrun`` and ``accelerate launch`` tell it."""

import os


def process_count() -> int:
    """Processes that work on the same command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_main_process() -> bool:
    """Whether this is the one that locks, writes and speaks."""
    return process_rank() == 0


def local_device(device: str) -> str:
    """The device of this process: ``cuda`` is the GPU of its number on this machine.

    Args:
        device: As asked for: ``cuda``, ``cuda:1``, ``cpu``, ...
    """
    if device == "cuda" and process_count() > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device
