"""Which of several processes this one is, as ``torchrun`` and ``accelerate launch`` tell it."""

import os
import time

# Launchers look every tenth of a second for a process that has failed, and then end the others.
LAUNCHER_SECONDS = 5.0

_LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_DISTRIBUTED_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")


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


def may_speak(code: int) -> bool:
    """Whether this process is to say why a command failed; one of them says it.

    The first one says it at once. The others wait: where it failed as well, the launcher ends them
    before they would say the same; where it did not, nobody else would say it.

    Args:
        code: The exit code; 130, Ctrl-C, reaches everyone and is told by the first one.
    """
    if is_main_process():
        return True
    try:
        time.sleep(LAUNCHER_SECONDS)
    except KeyboardInterrupt:
        return False
    return code != 130


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    if process_count() == 1:
        return False
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Socket closed",
        "Broken pipe",
    )
    told = str(error)
    return type(error).__name__ in _DISTRIBUTED_ERRORS or any(word in told for word in words)
