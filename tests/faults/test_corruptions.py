"""Damaged input of every kind: one clear line, exit 1 or 2, and nothing left behind."""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from helpers.damage import DAMAGES

from loram_cli.cli.app import run_command

COUNT = int(os.environ.get("FAULTS_CORRUPTIONS", "200"))
KEEP = ["--keep-first", "1", "--keep-last", "1", "--ratio", "0.5", "--strategy", "rand"]
SECRET = "outside/secret.safetensors"


class Watch:
    """Sees every file that is opened; an audit hook cannot be taken off again."""

    opened: list[str] | None = None

    @classmethod
    def hook(cls, event: str, args: tuple) -> None:
        if cls.opened is not None and event == "open" and isinstance(args[0], str | bytes):
            cls.opened.append(os.fsdecode(args[0]))


sys.addaudithook(Watch.hook)


def words_for(target: str, folder: Path) -> list[str]:
    run, out = str(folder / "run"), str(folder / "out")
    base = str(folder / "base")
    if target == "base":
        return ["prune", "--model", base, "--run", run, "--out", out, *KEEP]
    if target in ("adapter", "recovering base"):
        adapter = str(folder / "adapter")
        return ["recover", "--model", base, "--in", adapter, "--run", run, "--out", out]
    if target == "data":
        pruned, data = str(folder / "pruned"), str(folder / "data" / "data.jsonl")
        return ["train", "--in", pruned, "--data", data, "--run", run, "--out", out]
    if target == "recipe":
        return ["run", str(folder / "recipe" / "recipe.yaml"), "--run", run]
    return ["prune", "--run", str(folder / "state"), "--out", out, *KEEP]


def corrupt(number: int, finished_run: Path, base: Path, tmp_path: Path, capsys) -> None:
    draw = random.Random(number)
    target, damage = DAMAGES[number % len(DAMAGES)]
    shutil.copytree(base, tmp_path / "base")
    if target in ("adapter", "recovering base"):
        shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    if target == "data":
        shutil.copytree(finished_run / "pruned", tmp_path / "pruned")
    (tmp_path / "outside").mkdir()
    shutil.copyfile(base / "model.safetensors", tmp_path / SECRET)
    damaged = tmp_path / target.split()[-1]
    damaged.mkdir(exist_ok=True)
    what = damage(damaged, draw)
    before = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
    capsys.readouterr()
    Watch.opened = []
    try:
        code = run_command(words_for(target, tmp_path))
    finally:
        opened, Watch.opened = Watch.opened, None
    err = capsys.readouterr().err
    said = f"{number} {target}: {what}\n{err}"
    assert code in (1, 2), said
    errors = err[err.rindex("error: ") :]
    assert "Traceback" not in err, said
    assert "internal: " not in errors, said
    assert 1 <= len(errors.strip().splitlines()) <= 2, said
    assert len(errors) < 1200, said
    assert not any(SECRET in path for path in opened), said
    after = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} - {Path("run")}
    assert after <= before, f"{said}left behind: {after - before}"


# The first round has every kind once; a few of them stand for all in the default run.
@pytest.mark.parametrize("number", range(2, len(DAMAGES), 9))
def test_a_few_corruptions(number: int, finished_run, base, tmp_path, capsys):
    corrupt(number, finished_run, base, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
def test_many_corruptions(number: int, finished_run, base, tmp_path, capsys):
    corrupt(number, finished_run, base, tmp_path, capsys)


def test_an_adapter_of_another_base_is_refused(finished_run, base, tmp_path, capsys):
    from helpers.tiny_models import make_base

    other = make_base(tmp_path / "other", seed=7)
    words = ["recover", "--model", other, "--in", finished_run / "adapter"]
    words += ["--out", tmp_path / "out", "--run", tmp_path / "run"]
    assert run_command([str(word) for word in words]) == 1
    assert "was made from another base: weights differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
