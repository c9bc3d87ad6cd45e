"""A disk that runs full under every stage, and one that is mounted read-only: the kernel's own.

The run directory lies on a small tmpfs. Once a stage has begun, something else takes all space
that is left, so that no check beforehand can have seen it.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.workshop import STAGES, make_workshop

DISK_BYTES = 8 * 2**20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    place = tmp_path_factory.mktemp("disk")
    mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "loram-test", place)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def cramped(disk, zygote, base, text_file, instructions, tmp_path_factory):
    """A workshop whose run directory is on the small disk."""
    folder = tmp_path_factory.mktemp("cramped")
    return make_workshop(folder, disk / "run", zygote, base, text_file, instructions)


def check_refusal(shop, stage: str, done: dict) -> str:
    """One clear line of error, and no output; what an interruption may keep is beside it."""
    assert done["code"] == 1, shop.log
    errors = shop.log[shop.log.index("error: ") :].strip()
    assert "Traceback" not in shop.log
    assert "internal" not in errors, errors
    assert len(errors.splitlines()) <= 2, errors
    assert not shop.out(stage).exists()
    return errors


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_runs_full_is_told_and_the_same_command_goes_on(
    cramped, disk: Path, stage: str, share: float
):
    cramped.ensure(stage)
    cramped.clear(stage)
    point = max(1, round(share * cramped.events[stage]))
    filler = disk / "filler"
    done = cramped.stage(stage, fault={"fill": str(filler), "at_event": point})
    try:
        if done["code"] == 0:  # nothing was left to write, or the stage had ended before
            assert share > 0.5
        else:
            errors = check_refusal(cramped, stage, done)
            assert filler.stat().st_size > DISK_BYTES // 4
            assert "space" in errors, errors
    finally:
        filler.unlink(missing_ok=True)
    again = cramped.stage(stage)
    assert again["code"] == 0, cramped.log
    cramped.assert_same(stage)
    cramped.assert_nothing_beside()


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_from_the_start(cramped, disk: Path, stage: str):
    cramped.ensure(stage)
    cramped.clear(stage)
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)) == 4096:
                pass
    except OSError:
        pass
    try:
        before = {path.name for path in cramped.run.iterdir()}
        errors = check_refusal(cramped, stage, cramped.stage(stage))
        assert "space" in errors or "needed" in errors, errors
        assert {path.name for path in cramped.run.iterdir()} == before
    finally:
        filler.unlink()
    assert cramped.stage(stage)["code"] == 0, cramped.log
    cramped.assert_same(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_cannot_be_written(cramped, disk: Path, stage: str):
    """Also for root, whom file modes do not bind."""
    cramped.ensure(stage)
    cramped.clear(stage)
    mount("-o", "remount,ro", disk)
    try:
        before = {path.name for path in cramped.run.iterdir()}
        errors = check_refusal(cramped, stage, cramped.stage(stage))
        assert str(cramped.run) in errors, errors
        assert {path.name for path in cramped.run.iterdir()} == before
        # Nor is a new run directory made, or any other place written.
        words = [*cramped.commands[stage]]
        words[2] = str(disk / "another")
        assert cramped.loram(*words)["code"] in (1, 2), cramped.log
        assert "Traceback" not in cramped.log and "internal" not in cramped.log
    finally:
        mount("-o", "remount,rw", disk)
    assert cramped.stage(stage)["code"] == 0, cramped.log
    cramped.assert_same(stage)
