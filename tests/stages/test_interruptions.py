"""Killed in the middle of writing, or out of room: never a half directory that looks finished.

Commands run in forked children, which have the libraries in memory already.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from helpers.slow import slow
from helpers.tiny_models import make_adapter, make_base

from loram_cli.cli.app import run_command
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import MANIFEST_NAME
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import merge
from loram_cli.stages.recover import stage as recover

pytestmark = pytest.mark.integration

COUNTED = ("write", "fsync", "fdatasync", "rename", "unlink", "mkdir", "rmdir")
SILENT = NullReporter()
STAGES = ("prune", "recover", "merge")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A base, an adapter of its pruned model, and each stage's undisturbed output."""
    root = tmp_path_factory.mktemp("interruptions")
    base = make_base(root / "base")
    made = {"base": base, "adapter": root / "adapter"}
    made |= {stage: root / "reference" / stage for stage in STAGES}
    work("prune", made, made["prune"])()
    make_adapter(made["prune"], made["adapter"])
    work("recover", made, made["recover"])()
    work("merge", made, made["merge"])()
    return made


def work(stage: str, places: dict[str, Path], out: Path) -> Callable[[], object]:
    inputs = {"model": places["base"], "out": out}
    if stage == "prune":
        spec = prune.PruneSpec(
            **inputs, strategy="rand", ratio=0.5, keep_first=1, keep_last=1, max_shard_bytes=20_000
        )
        return lambda: prune.run(spec, SILENT)
    if stage == "recover":
        return lambda: recover.run(recover.RecoverSpec(**inputs, adapter=places["adapter"]), SILENT)
    spec = merge.MergeSpec(**inputs, adapter=places["recover"], max_shard_bytes=40_000)
    return lambda: merge.run(spec, SILENT)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds times."""
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != MANIFEST_NAME}


def in_child(job: Callable[[], object], error_file: Path) -> int:
    """Run a job in a fork: its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            descriptor = os.open(error_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            code = job() or 0
        finally:
            os._exit(code if isinstance(code, int) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(operation: int, job: Callable[[], object]) -> Callable[[], None]:
    """The job, killed just before its n-th write, flush or rename."""

    def run() -> None:
        done = count(1)

        def counted(original):
            def call(*args, **kwargs):
                if next(done) == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for name in COUNTED:
            setattr(os, name, counted(getattr(os, name)))
        job()

    return run


def kill_and_repeat(stage: str, places: dict[str, Path], root: Path, operation: int) -> bool:
    out = root / str(operation) / stage
    out.parent.mkdir()
    code = in_child(killed_at(operation, work(stage, places, out)), root / "stderr")
    assert code in (0, -signal.SIGKILL), (root / "stderr").read_text()
    reference = contents(places[stage])
    if (out / MANIFEST_NAME).exists():
        assert contents(out) == reference
    else:
        assert not out.exists()
    work(stage, places, out)()
    assert contents(out) == reference
    assert [path.name for path in out.parent.iterdir()] == [stage]
    return code != 0


@pytest.mark.parametrize("stage", ["prune", slow("recover"), slow("merge")])
def test_killed_and_repeated_is_as_if_undisturbed(stage, places, tmp_path):
    assert kill_and_repeat(stage, places, tmp_path, 3)
    assert kill_and_repeat(stage, places, tmp_path, 12)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_operation(stage, places, tmp_path):
    for operation in count(1):
        if not kill_and_repeat(stage, places, tmp_path, operation):
            break
    assert operation > 10


@pytest.mark.parametrize("kind", [signal.SIGTERM, slow(signal.SIGINT)])
@pytest.mark.parametrize("stage", ["prune", slow("merge")])
def test_a_signal_while_writing_leaves_nothing(stage, kind, places, tmp_path):
    """As the command line sets it up: SIGTERM exits with 143, Ctrl-C raises KeyboardInterrupt."""
    out = tmp_path / stage

    def job() -> int:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        original = os.write

        def write(*args):
            os.kill(os.getpid(), kind)
            return original(*args)

        os.write = write
        try:
            work(stage, places, out)()
        except KeyboardInterrupt:
            return 130
        except SystemExit as end:
            return end.code
        return 0

    assert in_child(job, tmp_path / "stderr") == {signal.SIGTERM: 143, signal.SIGINT: 130}[kind]
    assert [path.name for path in tmp_path.iterdir()] == ["stderr"]


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_room_is_one_line_and_leaves_nothing(stage, places, tmp_path):
    """A limit on the size of files stands in for a full disk: the kernel refuses the write."""
    run = ["--run", str(tmp_path / "run"), "--model", str(places["base"])]
    if stage == "prune":
        words = ["prune", *run, "--strategy", "rand", "--keep-first", "1", "--keep-last", "1"]
    else:
        words = ["recover", *run, "--in", str(places["adapter"])]
        words += ["--merge"] if stage == "merge" else []
    # The recovered adapter is smaller than any model.
    limit = 15_000 if stage == "recover" else 60_000

    def job() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return run_command(words)

    assert in_child(job, tmp_path / "stderr") == 1
    lines = (tmp_path / "stderr").read_text().splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("error: "))
    assert "internal" not in lines[start]
    assert "File too large" in lines[start]
    assert len(lines) - start <= 2
    left = {path.name for path in (tmp_path / "run").glob("*")}
    assert left <= ({"recovered"} if stage == "merge" else set())
