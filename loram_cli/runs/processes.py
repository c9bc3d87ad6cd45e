"""Which of several processes this one is, as ``torchrun`` and ``accelerate launch`` tell it."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

from loram_cli.errors import UsageError

# Launchers look every tenth of a second for a process that has failed, and then end the others.
LAUNCHER_SECONDS = 5.0

# A launcher whose processes are to stop gives them so long, and then kills them.
_GRACE_SECONDS = 30.0
_LOOK_SECONDS = 0.5
_STORE_SECONDS = 2.0
_DISTRIBUTED_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")


def process_count() -> int:
    """Processes that work on the same command; 1 without a launcher.

    Raises:
        UsageError: The launcher's variables say no number.
    """
    return _launcher_number("WORLD_SIZE", 1, at_least=1)


def process_rank() -> int:
    """This process's number, from 0."""
    return _launcher_number("RANK", 0, below=process_count()) if process_count() > 1 else 0


def _launcher_number(name: str, default: int, *, at_least: int = 0, below: int = 2**31) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 10 or not at_least <= int(text) < below:
        raise UsageError(
            f"{name} is '{text[:40]}', expected a number from {at_least} to {below - 1}",
            f"torchrun sets it; without a launcher: unset {name}",
        )
    return int(text)


def is_main_process() -> bool:
    """Whether this is the one that locks, writes and speaks."""
    return process_rank() == 0


def local_device(device: str) -> str:
    """The device of this process: ``cuda`` is the GPU of its number on this machine."""
    if device == "cuda" and process_count() > 1:
        return f"cuda:{_launcher_number('LOCAL_RANK', 0)}"
    return device


def may_speak(code: int) -> bool:
    """Whether this process is to say why a command failed; one of them says it.

    The first one says it at once. The others wait: where it failed as well, the launcher ends them
    before they would say the same; where it did not, nobody else would say it. Where the launcher
    is slow to end them, its store tells who spoke already. Exit code 130, Ctrl-C, reaches
    everyone and is reported by the first one.
    """
    try:
        is_main, alone = is_main_process(), process_count() == 1
    except UsageError:
        return True  # nobody knows which one this is
    if alone or code == 130:
        return is_main
    if not is_main:
        try:
            time.sleep(LAUNCHER_SECONDS)
        except KeyboardInterrupt:
            return False
    return _speaks_first()


def _speaks_first() -> bool:
    """Whether no other process of this launch has asked this; true where none can be asked."""
    # Set by torchrun and by what builds on it: its agent's store lies at the master's address.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    # Neither is in torch's own list of what it exports.
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        host, port = os.environ["MASTER_ADDR"], _launcher_number("MASTER_PORT", 0)
        # TCPStore would log pages about a launcher that is gone.
        socket.create_connection((host, port), _STORE_SECONDS).close()
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS))
        return bool(store.add(f"loram/failure-told/{attempt}", 1) == 1)
    except (OSError, OverflowError, KeyError, UsageError, DistError):
        return True


def leave_word(text: str) -> None:
    """Hand the launcher the reason of a failure, for the summary that it ends with.

    torchrun shows what it finds in the file that it names, in the form that torch's own error
    handler writes (torch.distributed.elastic.multiprocessing.errors).
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or process_count() == 1:
        return
    told = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps({"message": told}), "utf-8")


def end_with_launcher() -> None:
    """End this process when its launcher is killed, which could not end it any more.

    A watching thread interrupts it as Ctrl-C does: the step under way ends and its checkpoint is
    written. What does not end by that is ended as a launcher would.
    """
    if process_count() == 1:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_GRACE_SECONDS)
        os._exit(130)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


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
