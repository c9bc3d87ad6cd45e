"""One writer per directory: an advisory lock that names its holder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loram_cli.errors import LoramError

# What a link points to is not ours to empty, and a pipe would be waited for.
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def exclusive_lock(file: Path, guarded: Path) -> Iterator[None]:
    """Hold ``file`` locked, and remove it afterwards; the kernel lets go if the process dies.

    Raises:
        LoramError: Another process holds it (its process id is in the message).
    """
    descriptor = _acquire(file, guarded)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def refuse_if_held(file: Path, guarded: Path) -> None:
    """Look whether another process holds the lock, without taking or creating it.

    Raises:
        LoramError: As :func:`exclusive_lock`.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | _OPEN_FLAGS)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _held(descriptor, guarded) from error
    finally:
        os.close(descriptor)


def _held(descriptor: int, guarded: Path) -> LoramError:
    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    holder = holder if holder.isdecimal() else "unknown"
    return LoramError(
        f"{guarded}: in use by another loram command (process {holder})",
        "wait for it, or pass another --run or --out",
    )


def _acquire(file: Path, guarded: Path) -> int:
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o644)
        except OSError as error:
            if file.is_symlink():
                raise LoramError(
                    f"{file}: is a symbolic link where the lock belongs", "remove it"
                ) from error
            raise LoramError(f"{guarded}: cannot write here ({error.strerror})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            failure = _held(descriptor, guarded)
            os.close(descriptor)
            raise failure from error
        # The former holder may have removed the file between our open and our lock.
        if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
            try:
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            except OSError as error:
                file.unlink()
                os.close(descriptor)
                raise LoramError(f"{guarded}: cannot write here ({error.strerror})") from error
            return descriptor
        os.close(descriptor)
