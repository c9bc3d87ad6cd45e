"""Runs generated Python programs in a process of their own that can do as little as possible.

What holds (Linux on x86-64 or arm64; :class:`SandboxResult` says what held in each run):

- a separate session, killed as a group at the wall-clock limit; limits on CPU seconds, address
  space, file size, open files, no core files;
- an empty temporary directory, deleted afterwards, and an empty environment under ``python -I``;
- no network: a namespace of its own without interfaces, and ``socket`` refused by seccomp;
- no second process, no thread, no other program, no signal to another process (seccomp);
- files outside the temporary directory cannot be changed: read-only mounts in a private
  namespace with a 16 MiB scratch disk, and Landlock, each where the kernel permits it; as root,
  with every capability dropped;
- output is thrown away, so printing without end fills nothing;
- a program passes only if its last line ran: a random token, and nothing else, is then written on
  a private pipe, by functions that were bound before the program began. Neither ``sys.exit(0)``
  nor ``os._exit(0)`` before the asserts counts as a pass, nor a printed or written verdict, nor
  ``os.write``, ``os._exit`` or builtins replaced by the program.

What it does NOT protect from:

- *Reading.* The program can read every file that your user can read. It has nowhere to send it,
  but up to 1000 characters of an exception's text reach the result's ``detail``.
- *Cheating on purpose.* Tests run in the same interpreter as the code under test, as in every
  published HumanEval scorer: code written to fool them (objects equal to everything, digging the
  token out of the interpreter's frames) can. Models write wrong code; this scores that honestly.
- *The kernel and the processor.* This is no virtual machine: a kernel bug, or a side channel, is
  a way out. Evaluate models that you have reason to fear inside a virtual machine.
- *A kernel that offers less.* Without user namespaces the network is held by seccomp and files by
  Landlock (owner and mode of your own files can then be changed). Without those too (macOS, other
  processors), a Python audit hook refuses sockets, processes and outside files, which stops
  accidents and nothing more: ``network`` and ``files`` then read "refused in Python".
- *Load.* A program may use one core and its memory until the time limit.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loram_cli.errors import LoramError
from loram_cli.units import MIB

_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Attributes:
        status: ``passed`` only if the program ran to its last line.
        detail: Exception or signal of a failed program.
        network: What kept the network away: ``namespace``, ``seccomp``, ``refused in Python``.
        files: What kept outside files safe: ``read-only mounts``, ``landlock``,
            ``refused in Python``.
    """

    status: Literal["passed", "failed", "timed_out"]
    detail: str
    network: str
    files: str


def run_program(
    source: str, *, timeout_seconds: float = 10.0, memory_bytes: int = 512 * MIB
) -> SandboxResult:
    """Run Python source as a program, confined as the module describes.

    Args:
        source: The whole program, tests at its end.
        timeout_seconds: Wall clock, the interpreter's start included; CPU seconds likewise.
        memory_bytes: Address space of the process.

    Returns:
        How it ended. Never raises for anything that the program does.

    Raises:
        LoramError: The sandbox itself could not start.
    """
    if os.name != "posix":
        raise LoramError("generated code runs only on Linux and macOS", "leave humaneval out")
    token = secrets.token_hex(16)
    with (
        _scratch_folder() as directory,
        _pipe() as (report_read, report_write),
        tempfile.TemporaryFile() as order_file,
        tempfile.TemporaryFile() as noise_file,
    ):
        order = {
            "source": source,
            "token": token,
            "directory": str(directory),
            "report_fd": report_write,
            "timeout_seconds": timeout_seconds,
            "memory_bytes": memory_bytes,
        }
        order_file.write(json.dumps(order).encode())
        order_file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(_CHILD)],
            stdin=order_file,
            stdout=subprocess.DEVNULL,
            stderr=noise_file,
            pass_fds=(report_write,),
            cwd=directory,
            env=_clean_environment(directory),
            start_new_session=True,
        )
        timed_out = _wait(process, timeout_seconds)
        noise_file.seek(0)
        noise = noise_file.read(4096).decode(errors="replace").strip()
        os.set_blocking(report_read, False)
        return _judge(_read_all(report_read), token, process.returncode, timed_out, noise)


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder for one program, removed by a shell that outlives this process.

    The shell waits for its input to end: at the end of the block, or when this process is killed.
    It is there before the folder is, so that no kill comes in between.
    """
    directory = Path(tempfile.gettempdir()).resolve() / f"loram-sandbox-{secrets.token_hex(8)}"
    janitor = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; chmod -R u+rwX "$1"; rm -rf "$1"', "sh", directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    with janitor:
        directory.mkdir(0o700)
        directory.chmod(0o777)  # the program may have to run as another user
        yield directory


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _clean_environment(directory: Path) -> dict[str, str]:
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "LANG": "C.UTF-8",
        **dict.fromkeys(threads, "1"),
    }


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    """Wait for the end, at most until the limit; then kill the whole group. True: timed out."""
    deadline = time.monotonic() + timeout_seconds
    ended = False
    while not ended and time.monotonic() < deadline:
        ended = _has_ended(process)
        if not ended:
            time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not ended


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if sys.platform == "darwin":
        return process.poll() is not None
    # WNOWAIT leaves the leader unreaped, so that its group number still is its own at the kill.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _read_all(descriptor: int) -> bytes:
    """What lies in the pipe; the program's own noise in it is bounded by the pipe's capacity."""
    chunks: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    return b"".join(chunks)


def _judge(
    report: bytes, token: str, return_code: int, timed_out: bool, noise: str
) -> SandboxResult:
    first, _, rest = report.partition(b"\n")
    if not first and not timed_out:
        last_line = noise.splitlines()[-1] if noise else f"exit status {return_code}"
        raise LoramError(f"the sandbox for generated code could not start: {last_line}")
    held = json.loads(first) if first else {"network": "not started", "files": "not started"}
    network, files = held["network"], held["files"]
    # To the letter: what the program itself scribbles on the pipe spoils its verdict.
    if rest == b"passed " + token.encode() and return_code == 0:
        return SandboxResult("passed", "", network, files)
    # The CPU limit ends a process by SIGKILL.
    if timed_out or return_code in (-signal.SIGXCPU, -signal.SIGKILL):
        return SandboxResult("timed_out", "the time limit passed", network, files)
    kind, _, text = rest.partition(b" ")
    if kind == b"error":
        detail = text.decode(errors="replace")[:1000]
    elif return_code < 0:
        detail = f"ended by {signal.Signals(-return_code).name}"
    else:
        detail = f"exited with status {return_code} before the tests had finished"
    return SandboxResult("failed", detail, network, files)
