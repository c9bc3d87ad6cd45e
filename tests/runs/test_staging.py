import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.lock import exclusive_lock
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.rundir import RunDirectory
from loram_cli.runs.staging import staged_directory


def manifest(key: str = "k") -> Manifest:
    return Manifest(stage="prune", key=key, spec={}, inputs={}, base={})


def fill(final: Path, key: str = "k", **options: bool) -> None:
    with staged_directory(final, "prune", key, **options) as staged:
        (staged.path / "weights").write_text(key)
        staged.commit(manifest(key))


def test_commit_moves_into_place_and_leaves_nothing_beside(tmp_path: Path):
    fill(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MANIFEST_NAME, "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failure_leaves_nothing(tmp_path: Path):
    with pytest.raises(LoramError), staged_directory(tmp_path / "out", "prune", "k"):
        raise LoramError("broken")
    assert list(tmp_path.iterdir()) == []


def test_same_key_is_finished_and_other_keys_are_refused(tmp_path: Path):
    fill(tmp_path / "out")
    with staged_directory(tmp_path / "out", "prune", "k") as staged:
        assert staged.finished is not None
    with (
        pytest.raises(UsageError, match="pass --force"),
        staged_directory(tmp_path / "out", "prune", "other"),
    ):
        pass
    fill(tmp_path / "out", "other", force=True)
    assert (tmp_path / "out" / "weights").read_text() == "other"


def test_foreign_directories_are_never_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with (
        pytest.raises(UsageError, match="not an output of loram"),
        staged_directory(tmp_path / "out", "prune", "k"),
    ):
        pass
    assert (tmp_path / "out" / "mine").exists()


def test_resumable_work_survives_for_the_same_key_only(tmp_path: Path):
    for key, expected in (("a", False), ("a", True), ("b", False)):
        with (
            pytest.raises(LoramError),
            staged_directory(tmp_path / "out", "align", key, resumable=True) as staged,
        ):
            assert (staged.path / "checkpoint").exists() is expected
            (staged.path / "checkpoint").write_text("x")
            raise LoramError("interrupted")


def test_killed_between_the_renames_of_a_commit(tmp_path: Path):
    fill(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with staged_directory(tmp_path / "out", "prune", "k") as staged:
        assert staged.finished is not None


def test_second_process_is_refused_by_name(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from loram_cli.runs.lock import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1]), Path('guarded')):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            pytest.raises(LoramError, match=f"process {holder.pid}"),
            exclusive_lock(lock, Path("guarded")),
        ):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with exclusive_lock(lock, Path("guarded")):
                return
        except LoramError:
            time.sleep(0.05)
    raise AssertionError("the lock outlived its killed holder")


def test_manifest_round_trip_and_damage(tmp_path: Path):
    manifest().write(tmp_path)
    assert Manifest.read(tmp_path) == manifest()
    (tmp_path / MANIFEST_NAME).write_text('{"schema_version": 99}')
    with pytest.raises(LoramError, match="schema 99"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("{")
    with pytest.raises(LoramError, match="not a manifest"):
        Manifest.read(tmp_path)


def test_run_directory_remembers_its_model(tmp_path: Path, base: Path):
    run = RunDirectory(tmp_path / "run")
    assert run.settle_model(None, remember=False) == "demo"
    assert run.settle_model(str(base)) == str(base.resolve())
    assert run.settle_model(None) == str(base.resolve())
    fill(run.output("prune"))
    with pytest.raises(UsageError, match="this run is about"):
        run.settle_model("demo")
