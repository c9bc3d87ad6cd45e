"""Run commands and measure them: time, peak resident memory, page cache held by their files.

Imports nothing heavy: a child's ``ru_maxrss`` begins at its parent's peak, so the process that
measures must be small.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
GIB = 2**30


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring as it stands."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def environment_with(*folders: Path) -> dict[str, str]:
    """This environment, with folders that a child process may import from before all others."""
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@dataclass(frozen=True)
class Measure:
    """One run of a command."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    cached_bytes: int | None


def run(
    words: Sequence[str],
    *,
    watched: Sequence[Path] = (),
    data_limit_bytes: int | None = None,
) -> Measure:
    """Run a command to its end.

    Args:
        words: The command.
        watched: Directories whose share of the page cache is sampled once a second.
        data_limit_bytes: RLIMIT_DATA of the command: its heap and private maps may not be larger.
    """

    def limit() -> None:
        if data_limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit_bytes, data_limit_bytes))

    samples: list[int] = []
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(watched, samples, done))
    sampler.start()
    started = time.monotonic()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"failed ({process.returncode}): {' '.join(words)}\n{said}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Measure(seconds, cpu_seconds, usage.ru_maxrss * 1024, max(samples, default=None))


def forget(*directories: Path) -> None:
    """Write the files out and drop them from the page cache, so that every run starts alike."""
    os.sync()
    for directory in directories:
        for file in directory.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def generate(kind: str, *words: object) -> None:
    """Make an input of a bench in a process of its own."""
    run([sys.executable, str(Path(__file__).with_name("generate.py")), kind, *map(str, words)])


def shards(directory: Path) -> list[Path]:
    """The weight files of a directory."""
    return sorted(directory.glob("*.safetensors"))


def folder_bytes(directory: Path) -> int:
    """Bytes of a directory's weights."""
    return sum(file.stat().st_size for file in shards(directory))


def copy_command(source: Path, target: Path) -> list[str]:
    """``cp``, and then fsync of every file, as our own writer does."""
    return ["sh", "-c", f"cp -r '{source}' '{target}' && sync '{target}'/*"]


def direct_copy_command(source: Path, target: Path) -> list[str]:
    """A copy of the weights past the page cache, as our own reader and writer go."""
    copy = (
        'dd if="$file" of="$to/${file##*/}" bs=4M iflag=direct oflag=direct conv=fsync status=none'
    )
    loop = f"for file in '{source}'/*.safetensors; do {copy} || exit 1; done"
    return ["sh", "-c", f"mkdir '{target}' && to='{target}' && {loop}"]


def repeat(
    jobs: dict[str, Callable[[], Measure]], times: int, tell: Callable[[str], None]
) -> dict[str, Measure]:
    """Run all jobs in turn, several times over; medians of time, highest memory.

    In turn, so that a slow minute of a shared machine falls on all of them.
    """
    runs: dict[str, list[Measure]] = {label: [] for label in jobs}
    for _ in range(times):
        for label, job in jobs.items():
            runs[label].append(job())
            last = runs[label][-1]
            tell(
                f"  {label}: {last.seconds:.1f} s, of a processor {last.cpu_seconds:.1f} s, "
                f"peak {last.peak_bytes / MIB:.0f} MiB"
            )
    return {
        label: Measure(
            statistics.median(m.seconds for m in of),
            statistics.median(m.cpu_seconds for m in of),
            max(m.peak_bytes for m in of),
            max((m.cached_bytes for m in of if m.cached_bytes is not None), default=None),
        )
        for label, of in runs.items()
    }


def remove(*directories: Path) -> None:
    """Delete outputs of a run."""
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _sample(directories: Sequence[Path], samples: list[int], done: threading.Event) -> None:
    if not directories or shutil.which("fincore") is None:
        return
    while not done.wait(1.0):
        files = [str(f) for d in directories for f in d.rglob("*.safetensors")]
        words = ["fincore", "--bytes", "--raw", "--noheadings", "--output", "RES", *files]
        told = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        samples.append(sum(int(line) for line in told.split()))


class AnonymousPeak:
    """Samples the process's anonymous memory every few milliseconds while a block runs.

    Pages of mapped files are the kernel's to take back, and do not count.

    Args:
        every_seconds: Between two samples; each one costs a tenth of a millisecond.

    Attributes:
        peak_bytes: The most that was held, above what was at the start.
    """

    def __init__(self, every_seconds: float = 0.002) -> None:
        self._every_seconds = every_seconds
        self._start, self._done, self.peak_bytes = anonymous_bytes(), threading.Event(), 0
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "AnonymousPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def above_start_bytes(self) -> int:
        """What is held now, above what was at the start."""
        return anonymous_bytes() - self._start

    def _sample(self) -> None:
        while not self._done.wait(self._every_seconds):
            self.peak_bytes = max(self.peak_bytes, self.above_start_bytes())


def anonymous_bytes() -> int:
    """Anonymous memory of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def told_by(code: str, *words: object) -> dict[str, Any]:
    """What a program prints last, as JSON; it runs in a process of its own and can import this.

    Args:
        code: The program.
        words: Its arguments.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, words)],
        env=environment_with(Path(__file__).parent),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
