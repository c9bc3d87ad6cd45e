"""``--dry-run`` of every stage: the plan, every check that needs no tensor, and no file."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_adapter
from safetensors.torch import load_file, save_file

from loram_cli.cli.app import run_command
from loram_cli.runs.lock import exclusive_lock

FLAGS = ["--strategy", "rand", "--keep-first", "1", "--keep-last", "1", "--ratio", "0.5"]


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("dry") / "run"
    assert run_command(["prune", "--run", str(run), "--model", str(base), *FLAGS]) == 0
    make_adapter(run / "pruned", run / "adapter")
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def words(run, text_file, instructions):
    given = {
        "prune": [*FLAGS, "--out", run / "again"],
        "align": ["--data", text_file, "--steps", 7, "--batch", 4, "--block-length", 32],
        "train": ["--data", instructions, "--steps", 30, "--batch", 4, "--out", run / "other"],
        "recover": ["--merge"],
        "eval": ["--tasks", "perplexity", "--task-data", f"perplexity={instructions}"],
    }

    def build(stage: str, *more: object) -> list[str]:
        return [str(w) for w in (stage, "--run", run, *given[stage], "--dry-run", *more)]

    return build


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("stage", ["align", "train", "recover", "eval"])
def test_the_plan_is_told_and_nothing_is_written(stage, words, run, capsys):
    before = listing(run)
    assert run_command(words(stage)) == 0
    out = capsys.readouterr().out
    assert f"would {stage}: read " in out
    assert "free" in out
    assert run_command(words(stage, "--json")) == 0
    first = json.loads(capsys.readouterr().out)["plans"][0]
    assert first["stage"] == stage
    assert first["memory_bytes"] > 0
    assert listing(run) == before


def test_figures_of_the_plans(words, run, capsys):
    from loram_cli.checkpoint.index import CheckpointIndex

    def plan(stage):
        capsys.readouterr()
        assert run_command(words(stage, "--json")) == 0
        plans = json.loads(capsys.readouterr().out)["plans"]
        told = [{**plan, **plan.pop("figures")} for plan in plans]
        return told[0] if len(told) == 1 else told

    params = CheckpointIndex.open(run / "pruned").num_params
    head = 258 * 32
    align = plan("align")
    assert align["tokens"] == 7 * 4 * 32
    assert (align["params"], align["trained_params"]) == (params, params - head)
    assert align["memory_bytes"] == 4 * (params + 3 * (params - head))
    train = plan("train")
    assert (train["examples"], train["eval_examples"]) == (54, 6)
    assert train["epochs"] == round(30 * 4 / 54, 2)
    recover, merge = plan("recover")
    factors = load_file(run / "adapter" / "adapter_model.safetensors").values()
    assert recover["small_params"] == sum(t.numel() for t in factors)
    assert recover["full_params"] > recover["small_params"]
    assert merge["disk_bytes"] > 4 * merge["params"]


def fails(words: list[str], code: int, message: str, capsys) -> None:
    capsys.readouterr()
    assert run_command(words) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("stage", ["prune", "align", "train", "recover", "eval"])
def test_an_output_in_use_is_told(stage, words, run, capsys):
    names = {
        "prune": "again",
        "align": "aligned",
        "train": "other",
        "recover": "recovered",
        "eval": "eval",
    }
    final = run / names[stage]
    with exclusive_lock(run / f".{final.name}.lock", final):
        fails(words(stage), 1, "in use by another loram command", capsys)


@pytest.mark.parametrize("stage", ["prune", "align", "train", "recover"])
def test_too_little_disk_is_told(stage, words, monkeypatch, capsys):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    fails(words(stage), 1, "needed, 1000 B free", capsys)


@pytest.mark.parametrize("stage", ["prune", "align", "train", "recover"])
def test_a_foreign_output_is_told(stage, words, run, capsys):
    other = run / "foreign"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    fails(words(stage, "--out", other), 2, "is not an output of loram", capsys)


@pytest.mark.parametrize("stage", ["align", "train"])
def test_a_source_without_tokenizer_or_with_a_wrong_shape_is_told(stage, words, run, capsys):
    file = run / "pruned" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.zeros(33)
    save_file(tensors, file)
    fails(words(stage), 1, "model.norm.weight has shape [33]", capsys)
    (run / "pruned" / "tokenizer.json").unlink()
    fails(words(stage), 1, "no tokenizer", capsys)


@pytest.mark.parametrize("stage", ["align", "train"])
def test_unreadable_data_is_told(stage, words, tmp_path, capsys):
    fails(words(stage, "--data", "./gone.jsonl"), 1, "gone.jsonl: no such file", capsys)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{oh\n")
    fails(words(stage, "--data", broken), 1, "broken.jsonl, line 1", capsys)


def test_an_unknown_target_is_told(words, capsys):
    fails(words("train", "--targets", "q_prj"), 2, "did you mean 'q_proj'", capsys)


def test_an_adapter_that_does_not_fit_is_told(words, run, capsys):
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.1." in n and n.endswith("up_proj.lora_B.weight"))
    tensors[name] = torch.zeros(40, 2)
    save_file(tensors, file)
    fails(words("recover"), 1, "what was kept of the base's weight 20 x 32", capsys)


def test_a_missing_row_or_empty_data_is_told(words, run, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    fails(words("eval", "--task-data", f"perplexity={empty}"), 1, "is empty", capsys)
    (run / "pruned" / "model.safetensors").unlink()
    fails(words("eval"), 1, "pruned", capsys)


def test_what_is_done_is_told(words, run, capsys):
    assert run_command(["recover", "--run", str(run)]) == 0
    capsys.readouterr()
    assert run_command(words("recover")) == 0
    out = capsys.readouterr().out
    assert "recovered is done already" in out
    assert "would merge" in out
