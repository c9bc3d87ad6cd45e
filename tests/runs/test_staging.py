import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.lock import exclusive_lock
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest, sealed
from loram_cli.runs.rundir import RunDirectory
from loram_cli.runs.staging import look_up, staged_directory


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


def test_folders_made_for_an_output_go_with_its_failure(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(LoramError), staged_directory(tmp_path / "mine/a/b", "prune", "k"):
        raise LoramError("broken")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    resumable = staged_directory(tmp_path / "mine/a/b", "prune", "k", resumable=True)
    with pytest.raises(LoramError), resumable as staged:
        (staged.path / "checkpoints").mkdir()
        (staged.path / "checkpoints" / "one").write_text("x")
        raise LoramError("broken")
    assert (tmp_path / "mine/a/.b.partial/checkpoints/one").is_file()


@pytest.mark.parametrize("is_link", [True, False])
def test_what_is_no_old_output_is_never_taken_for_one(is_link, tmp_path: Path):
    mine, old = tmp_path / "mine", tmp_path / ".out.old"
    mine.write_text("x")
    old.symlink_to(mine) if is_link else old.write_text("x")
    with pytest.raises(UsageError, match=r"\.out\.old: stands where"):
        fill(tmp_path / "out")
    assert old.read_text() == mine.read_text() == "x"
    assert not (tmp_path / "out").exists()


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
            checkpoint = staged.path / "checkpoints" / "1"
            assert checkpoint.exists() is expected
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_text("x")
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
    with pytest.raises(UsageError, match="--model is empty"):
        RunDirectory(tmp_path / "other").settle_model("")


def test_force_replaces_outputs_of_loram_only(tmp_path: Path):
    out = tmp_path / "out"
    out.write_text("three years of work")
    for _ in range(2):
        for call in (lambda: fill(out, force=True), lambda: look_up(out, "prune", "k", force=True)):
            with pytest.raises(UsageError, match="not an output of loram"):
                call()
        if out.is_file():
            assert out.read_text() == "three years of work"
            out.unlink()
            (out / "sub").mkdir(parents=True)
            (out / "sub" / "thesis.tex").write_text("x")
    assert (out / "sub" / "thesis.tex").read_text() == "x"
    # A record of something else is no record of ours.
    (out / MANIFEST_NAME).write_text("{}")
    with pytest.raises(UsageError, match="not an output of loram"):
        fill(out, force=True)


def test_force_replaces_no_output_that_somebody_else_uses_too(tmp_path: Path):
    fill(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"notes.md: was not written by loram"):
        fill(tmp_path / "out", "other", force=True)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"
    (tmp_path / "out" / "notes.md").unlink()
    fill(tmp_path / "out", "other", force=True)


def test_a_damaged_output_of_ours_can_be_replaced(tmp_path: Path):
    fill(tmp_path / "out")
    file = tmp_path / "out" / MANIFEST_NAME
    file.write_text(file.read_text().replace('"prune"', '"align"'))
    fill(tmp_path / "out", "other", force=True)
    assert (tmp_path / "out" / "weights").read_text() == "other"


def test_a_replaced_output_stands_until_the_new_one_is_whole(tmp_path: Path):
    fill(tmp_path / "out")
    with (
        pytest.raises(LoramError, match="broken"),
        staged_directory(tmp_path / "out", "prune", "other", force=True),
    ):
        raise LoramError("broken")
    assert Manifest.read(tmp_path / "out").key == "k"


def test_data_goes_where_a_link_points(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    fill(tmp_path / "out")
    fill(tmp_path / "out", "other", force=True)
    assert (tmp_path / "out").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["big"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="loop"):
        fill(tmp_path / "loop")


def test_what_a_kill_left_goes_with_the_next_command(tmp_path: Path):
    fill(tmp_path / "out")
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "big").write_text("x")
    fill_again = staged_directory(tmp_path / "out", "prune", "k")
    with fill_again as staged:
        assert staged.finished is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resumable_work_of_another_key_outlives_a_finished_command(tmp_path: Path):
    fill(tmp_path / "out")
    partial = tmp_path / ".out.partial"
    for key, stays in (("other", True), ("k", False)):
        (partial / "checkpoints").mkdir(parents=True, exist_ok=True)
        (partial / "loram-key").write_text(key)
        with staged_directory(tmp_path / "out", "prune", "k", resumable=True) as staged:
            assert staged.finished is not None
        assert partial.exists() is stays


def test_work_without_anything_to_resume_from_goes(tmp_path: Path):
    with (
        pytest.raises(LoramError),
        staged_directory(tmp_path / "out", "train", "k", resumable=True) as staged,
    ):
        (staged.path / "loss.csv").write_text("nan")
        (staged.path / "checkpoints").mkdir()
        (staged.path / "checkpoints" / "run.json").write_text("{}")
        raise LoramError("the loss is not finite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(umask, mode, tmp_path: Path):
    before = os.umask(umask)
    try:
        with staged_directory(tmp_path / "out", "prune", "k") as staged:
            (staged.path / "sub").mkdir()
            (staged.path / "sub" / "weights").touch(0o600)
            staged.commit(manifest())
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert len(files) == 2


def test_a_lock_is_never_taken_through_a_link(tmp_path: Path):
    (tmp_path / "precious").write_text("x" * 10)
    (tmp_path / ".out.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(LoramError, match=r"out.lock: is a symbolic link"):
        fill(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "x" * 10


def test_a_damaged_lock_file_is_no_obstacle(tmp_path: Path):
    (tmp_path / ".out.lock").write_bytes(bytes(range(128, 256)))
    with (tmp_path / ".out.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for call in (
            lambda: fill(tmp_path / "out"),
            lambda: look_up(tmp_path / "out", "prune", "k"),
        ):
            with pytest.raises(LoramError, match="process unknown"):
                call()
    fill(tmp_path / "out")


def test_the_state_file_is_never_written_through_a_link(tmp_path: Path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".run.json.tmp").symlink_to(tmp_path / "precious")
    RunDirectory(tmp_path).settle_model("demo")
    assert (tmp_path / "precious").read_text() == "x"
    assert RunDirectory(tmp_path).remembered_model() == "demo"


@pytest.mark.parametrize("change", [{"results": {"a": 1}}, {"key": "other"}, {"digest": None}])
def test_a_record_needs_its_digest(change, tmp_path: Path):
    manifest().write(tmp_path)
    file = tmp_path / MANIFEST_NAME
    data = {**json.loads(file.read_text()), **change}
    for seal in (data.get("digest"), None):
        file.write_text(
            json.dumps(
                {**data, "digest": seal}
                if seal
                else {k: v for k, v in data.items() if k != "digest"}
            )
        )
        with pytest.raises(LoramError, match="was changed after it was written"):
            Manifest.read(tmp_path)


def test_a_record_sealed_anew_is_read(tmp_path: Path):
    """What is published has no local paths, and a seal of its own."""
    manifest().write(tmp_path)
    data = json.loads((tmp_path / MANIFEST_NAME).read_text())
    (tmp_path / MANIFEST_NAME).write_text(sealed({**data, "base": {"path": "base"}}))
    assert Manifest.read(tmp_path).base == {"path": "base"}
