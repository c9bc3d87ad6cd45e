"""A process for each row, started before the row's turn: importing takes as long as measuring.

The next row's process has imported the libraries and waits while this row runs; it touches the GPU
only when it is told to begin. In a rehearsal on the CPU, where imports would be nearly all of the
time, one process imports and forks for each row.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_START_SECONDS = 120.0


class Worker:
    """A process that waits for a row.

    Args:
        forks: Whether it forks for each row, and so serves more than one.
        log: What it prints before a row has a log of its own.

    Attributes:
        used: Whether it was given a row.
    """

    def __init__(self, forks: bool, log: Path) -> None:
        self.forks, self.used = forks, False
        self._log = log
        words = [sys.executable, "-W", "ignore", "-m", "gpu.worker", *(["--fork"] if forks else [])]
        paths = [str(ROOT), str(ROOT / "tests" / "benchmarks"), str(ROOT / "tests")]
        known = os.environ.get("PYTHONPATH")
        environment = {**os.environ, "PYTHONPATH": ":".join(paths + ([known] if known else []))}
        if forks:
            # bitsandbytes compiles its CPU kernels for half a minute, which tells nothing here.
            environment["TORCHDYNAMO_DISABLE"] = "1"
        with log.open("a") as said:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, job: dict[str, Any], limit_seconds: float) -> str | None:
        """Have a row measured.

        Args:
            job: For :func:`.worker.main`.
            limit_seconds: After these it is ended, with all that it started.

        Returns:
            Why it failed, or None.
        """
        self.used = True
        if self._next(_START_SECONDS) != "ready":
            self.end()
            return f"its process did not start; see {self._log}"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            return f"its process is gone ({error})"
        done = self._next(limit_seconds)
        if done is None:
            code = self._process.wait()
            return f"its process ended with code {code}"
        if done == "":
            self.end()
            return f"not done within {limit_seconds:.0f} s"
        code = int(done.removeprefix("done "))
        return None if code == 0 else f"exit code {code}"

    @property
    def serves_more(self) -> bool:
        """Whether another row can be given to it."""
        return self.forks and self._process.poll() is None

    def end(self) -> None:
        """End it and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _next(self, seconds: float) -> str | None:
        """Its next line; empty where none came in time, None where it has ended."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)
