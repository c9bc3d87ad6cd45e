"""Every stage is killed at seeded points; the same command then ends as if nothing had been.

``LORAM`` is no prefix here, since commands read such variables: ``FAULTS_KILLS`` sets how many.
"""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers.slow import slow

from loram_cli.runs.rundir import OUTPUTS

# The first test of a stage runs all that comes before it, beside whatever else the machine does.
pytestmark = pytest.mark.timeout(1200)

KILLS = int(os.environ.get("FAULTS_KILLS", "100"))
STAGES = list(OUTPUTS)
# Each stage on the output of the one before it: without that, it must refuse.
NEXT = {"prune": "align", "train": "recover"}


def disturb(workshop, stage: str, number: int, kind: int = signal.SIGKILL) -> dict:
    """Run a stage with a fault at a point drawn from its number: half at file operations."""
    workshop.ensure(stage)
    draw = random.Random(f"{stage} {number}")
    fault: dict = {"signal": int(kind)}
    if number % 2:
        fault["at_seconds"] = draw.uniform(0, workshop.seconds[stage])
    else:
        fault["at_event"] = draw.randint(1, workshop.events[stage])
    workshop.clear(stage)
    return workshop.stage(stage, fault=fault)


def kill_and_go_on(workshop, stage: str, number: int) -> bool:
    killed = disturb(workshop, stage, number)
    assert killed["code"] in (0, -signal.SIGKILL), workshop.log
    if (workshop.out(stage) / "loram.json").exists():
        workshop.assert_same(stage)
    else:
        assert not workshop.out(stage).exists()
        if stage in NEXT:
            assert workshop.stage(NEXT[stage])["code"] == (0 if stage == "align" else 1)
            # The next one was done already from the same input, or refuses without it.
    again = workshop.stage(stage)
    assert again["code"] == 0, workshop.log
    workshop.assert_same(stage)
    workshop.assert_nothing_beside()
    return killed["code"] == -signal.SIGKILL


@pytest.mark.parametrize(
    "stage",
    [s if s == "train" else slow(s) for s in STAGES],
)
def test_a_kill_at_a_file_operation(workshop, stage: str):
    assert kill_and_go_on(workshop, stage, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, max(2, KILLS - len(STAGES) + 1)))
def test_kills_at_many_points(workshop, number: int):
    kill_and_go_on(workshop, STAGES[number % len(STAGES)], number // len(STAGES) + 1)


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
# Of five steps: amid them, once the last is done, while its checkpoint is ending, and while the
# output is being finished. Before all of it is in place, success must not be claimed.
PLACES = (
    "checkpoint-2",
    "checkpoint-5",
    "checkpoint-5/trainer_state",
    "loss.csv",
    ".partial/loram.json",
)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        pytest.param(
            kind,
            place,
            marks=() if i + j == 1 else pytest.mark.slow,
            id=f"{kind.name}-{place}",
        )
        for i, kind in enumerate(SIGNALS)
        for j, place in enumerate(PLACES)
    ],
)
def test_signals_stop_cleanly_and_the_same_command_goes_on(workshop, kind: int, place: str):
    workshop.ensure("train")
    workshop.clear("train")
    stopped = workshop.stage("train", fault={"signal": int(kind), "at_path": place})
    assert stopped["code"] == SIGNALS[kind], workshop.log
    assert "Traceback" not in workshop.log
    assert not workshop.out("train").exists()
    assert workshop.stage("train")["code"] == 0, workshop.log
    done = "3" if place == "checkpoint-2" else "5"
    assert f"resuming at step {done} of 5" in workshop.log
    workshop.assert_same("train")
    workshop.assert_nothing_beside()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SIGNALS, signal.SIGKILL])
def test_layers_that_come_and_go_are_stopped_and_resumed_alike(workshop, kind: int):
    workshop.ensure("polish")
    workshop.clear("polish")
    # The checkpoint of the second of four steps is whole then.
    stopped = workshop.stage("polish", fault={"signal": int(kind), "at_path": "checkpoint-3"})
    assert stopped["code"] == SIGNALS.get(kind, -kind), workshop.log
    assert "Traceback" not in workshop.log
    assert not workshop.out("polish").exists()
    assert workshop.stage("polish")["code"] == 0, workshop.log
    assert re.search("resuming at step [234] of 4", workshop.log), workshop.log
    workshop.assert_same("polish")
    workshop.assert_nothing_beside()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_in_the_last_step_of_a_stage_ends_the_whole_recipe(workshop, kind: int):
    """Of ``run``, no later stage begins; what is done stays done, and the rest follows after."""
    workshop.ensure("train")
    for path in workshop.run.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (workshop.folder / "recipe.yaml").write_text(json.dumps(workshop.recipe()))
    words = ["run", "recipe.yaml", "--run", str(workshop.run)]
    stopped = workshop.loram(*words, fault={"signal": int(kind), "at_path": "checkpoint-5"})
    assert stopped["code"] == SIGNALS[kind], workshop.log
    made = {path.name for path in workshop.run.iterdir() if not path.name.startswith(".")}
    assert made == {"pruned", "run.json"}
    assert workshop.loram(*words)["code"] == 0, workshop.log
    assert {path.name for path in workshop.run.iterdir()} == {
        "pruned", "adapter", "recovered", "run.json",
    }  # fmt: skip


def test_a_second_command_is_refused_and_names_the_first(workshop):
    workshop.ensure("train")
    workshop.clear("train")
    middle = {"signal": int(signal.SIGSTOP), "at_path": "checkpoint-2"}
    first = workshop.stage("train", fault=middle)
    assert first["code"] is None
    second = workshop.stage("train", log="second")
    try:
        log = (workshop.folder / "second").read_text()
        assert second["code"] == 1
        assert f"in use by another loram command (process {first['pid']})" in log
    finally:
        ended = workshop.zygote.ask(resume=first["pid"])
    assert ended["code"] == 0, workshop.log
    workshop.assert_same("train")


@pytest.mark.parametrize("place", ["/proc/out", "/sys/out", "a file/out", "closed/out"])
def test_a_place_that_cannot_be_written(workshop, place: str):
    workshop.ensure("train")
    workshop.clear("eval")
    (workshop.folder / "a file").write_text("x")
    closed = workshop.folder / "closed"
    closed.mkdir(exist_ok=True)
    closed.chmod(0o500)
    if place.startswith("closed") and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    for stage in ("prune", "train"):
        done = workshop.loram(*workshop.commands[stage], "--out", place)
        assert done["code"] == 1, workshop.log
        errors = workshop.log[workshop.log.index("error: ") :]
        assert "Traceback" not in errors
        assert "internal" not in errors
        assert place in errors or str(Path(place).parent) in errors
        assert len(errors.splitlines()) <= 2
