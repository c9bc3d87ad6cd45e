import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.slow import slow

from loram_cli import pipeline
from loram_cli.cli.app import run_command
from loram_cli.config.recipe import load_recipe
from loram_cli.evaluation import lmeval
from loram_cli.memory.account import BF16_BYTES
from loram_cli.reporting import NullReporter
from loram_cli.runs.rundir import RunDirectory

pytestmark = pytest.mark.integration

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
FLAGS = ["--keep-first", "1", "--keep-last", "1", "--ratio", "0.5"]


def loram(*words: object) -> int:
    return run_command([str(word) for word in words])


def test_chain_of_commands(base, text_file, instructions, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORAM_RUN", str(tmp_path / "run"))
    assert loram("prune", "--model", base, "--strategy", "rand", *FLAGS) == 0
    assert "next: loram align" in capsys.readouterr().out
    assert loram("train", "--data", instructions, "--steps", 2, "--batch", 4) == 0
    assert loram("recover", "--merge", "--json") == 0
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert out["recover"]["results"]["modules"] == 29
    data = f"perplexity={instructions}"
    code = loram("eval", "--tasks", "perplexity,humaneval", "--task-data", data, "--limit", 8)
    assert code == 0
    table = capsys.readouterr().out
    assert "recovered" in table
    assert "merged" in table
    assert "--allow-code-execution" in table
    again = [*map(str, ["eval", "--tasks", "perplexity,humaneval", "--task-data", data])]
    assert loram(*again, "--limit", 8) == 0
    assert "was done already" in capsys.readouterr().out
    assert loram(*again, "--limit", 4, "--rows", "base") == 0
    assert "was done already" not in capsys.readouterr().out
    assert loram("memory-report") == 0
    assert "pruned" in capsys.readouterr().out


def test_same_command_again_is_done_already(base, tmp_path, capsys):
    words = ["prune", "--run", tmp_path, "--model", base, "--strategy", "rand", *FLAGS]
    assert loram(*words) == 0
    assert loram(*words) == 0
    assert "was done already" in capsys.readouterr().out
    assert loram(*words[:-1], "0.6") == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["prune", "--ratio", "1.5"], 2, "--ratio 1.5 is outside (0, 1)"),
        (["prune", "--strategy", "strut"], 2, "did you mean 'stru'"),
        (["prune", "--nonsense"], 2, "--nonsense"),
        (["prune", "--model", "./gone"], 1, "./gone: no such directory"),
        (["align"], 1, "run 'loram prune' first"),
        (["train"], 1, "run 'loram prune' first"),
        (["recover"], 1, "run 'loram train' first"),
        (["eval", "--task-data", "gsm8k"], 2, "NAME=FILE"),
        (["memory-report", "--preset", "llama2-13"], 2, "did you mean 'llama2-13b'"),
        (["run", "gone.yaml"], 2, "gone.yaml"),
    ],
)
def test_mistakes_are_one_or_two_lines(words, code, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORAM_RUN", str(tmp_path / "run"))
    assert loram(*words) == code
    err = capsys.readouterr().err
    assert message in err
    errors = [line for line in err.splitlines() if not line.startswith(("no --model", "defaults"))]
    assert len(errors) <= 2
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "pruned").exists()


def test_dry_run_writes_nothing(base, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["prune", "--run", run, "--model", base, "--strategy", "rand", *FLAGS, "--dry-run"]
    assert loram(*words) == 0
    assert "would prune" in capsys.readouterr().out
    assert not run.exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_open_with_their_launch_line_and_dry_run(recipe: Path, tmp_path, capsys):
    lines = recipe.read_text().splitlines()
    assert lines[0] == f"# loram run recipes/{recipe.name}"
    assert any("Memory:" in line for line in lines[:8])
    plan = pipeline.plan(load_recipe(recipe), RunDirectory(tmp_path / "run"), NullReporter())[0]
    pruned = plan.figures["result"]
    assert pruned.weight_bytes < BF16_BYTES * pruned.base_params
    assert loram("run", recipe, "--dry-run") == 0
    assert "prune" in capsys.readouterr().out


def test_unknown_recipe_keys_get_a_suggestion(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text("model: demo\nprune:\n  ratioo: 0.5\n")
    assert loram("run", file) == 2
    assert "did you mean 'ratio'" in capsys.readouterr().err
    file.write_text("model: demo\nprune:\n  ratio: high\n")
    assert loram("run", file) == 2
    assert "expected a number, not 'high'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("train: {data: gone.jsonl}", "gone.jsonl: no such file"),
        ("eval: {tasks: perplexity, task_data: {perplexity: gone.txt}}", "gone.txt: no such file"),
        ("eval: {tasks: 'lm_eval:gsm9k'}", "unknown task 'gsm9k'"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_recipe_is_refused_before_its_first_stage(
    more, message, words, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lmeval, "TaskManager", NoTasks)  # its whole index takes ten seconds
    lmeval._manager_of.cache_clear()
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {base}\nprune: {{strategy: rand, keep_first: 1}}\n{more}\n")
    assert loram("run", file, "--run", tmp_path / "run", *words) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class NoTasks:
    """Of lm-eval's TaskManager what is asked of it, without a task."""

    all_tasks = ()

    def __init__(self, **options: object) -> None:
        """Read nothing."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune", "--out", ""), "--out: expected a path, and it is empty"),
        (("prune", "--model", "", "--dry-run"), "--model is empty"),
        (("prune", "--model", "x" * 5000), f"error: {'x' * 600} ... {'x' * 200}"),
    ],
)
def test_empty_and_endless_values_are_told_shortly(words, message, capsys):
    assert loram(*words) in (1, 2)
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_link_to_itself_is_told(base, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    words = ["prune", "--model", base, "--strategy", "rand", *FLAGS, "--out", tmp_path / "loop"]
    assert loram(*words) == 2
    assert "loop: a symbolic link that leads to itself" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "told"), [("link", "to itself"), ("nowhere", "nowhere")])
def test_a_run_directory_that_is_a_link_to_nothing_is_told(base, tmp_path, capsys, target, told):
    link = tmp_path / "link"
    link.symlink_to(target)
    words = ["prune", "--model", base, "--strategy", "rand", *FLAGS, "--run", link]
    for more in ([], ["--dry-run"]):
        assert loram(*words, *more) == 2
        assert f"a symbolic link that leads {told}" in capsys.readouterr().err


def test_interrupt_is_130_and_leaves_nothing_half_written(base, text_file, tmp_path):
    run = tmp_path / "run"
    assert loram("prune", "--run", run, "--model", base, "--strategy", "rand", *FLAGS) == 0
    words = ["align", "--run", str(run), "--data", str(text_file), "--steps", "100000"]
    words += ["--batch", "4", "--block-length", "32", "--save-steps", "5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loram_cli", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    checkpoints = run / ".aligned.partial" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "the same command resumes" in err
    assert "Traceback" not in err
    assert not (run / "aligned").exists()


@pytest.mark.slow
def test_real_weights_and_text(shared: Path, tmp_path, capsys):
    model, data = shared / "models" / "stories260k", shared / "data"
    run = ["--run", tmp_path / "run"]
    text = ["--calibration", data / "wikitext2_valid.txt"]
    keep = ["--keep-first", 1, "--keep-last", 1]
    assert loram("prune", *run, "--model", model, "--ratio", 0.5, *keep, *text) == 0
    words = ["--steps", 40, "--batch", 16, "--micro-batch", 16, "--learning-rate", 5e-3]
    words += ["--warmup-steps", 5, "--data", data / "gsm8k_train.jsonl"]
    assert loram("train", *run, *words) == 0
    assert loram("recover", *run) == 0
    test = f"perplexity={data / 'gsm8k_test.jsonl'}"
    capsys.readouterr()
    assert (
        loram("eval", *run, "--tasks", "perplexity", "--task-data", test, "--limit", 100, "--json")
        == 0
    )
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]["rows"]
    scores = {label: row["scores"][0]["value"] for label, row in rows.items()}
    assert scores["recovered"] < scores["base"] < scores["pruned"]


@pytest.mark.parametrize(
    ("pruning", "processes", "method"),
    [("stru", 1, "reconstruct,pretrain"), slow("semi", 1, None), slow("stru", 2, None)],
)
def test_the_demo_aligns_by_what_its_pruning_allows(
    pruning, processes, method, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("LORAM_RUN", str(tmp_path / "run"))
    assert loram("prune", "--strategy", pruning, "--importance", "l2") == 0
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    capsys.readouterr()
    assert loram("align", "--dry-run") == 0
    said = capsys.readouterr()
    assert "would align" in said.out
    assert ("method=" in said.err) == (method is not None)
    assert (f"method={method}" in said.err) or method is None
