"""A chat template goes from training to the recovered adapter, and that row is asked by it."""

import json
from pathlib import Path

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import UsageError
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.evaluate.rows import as_chat
from loram_cli.stages.evaluate.spec import EvalSpec

FIT = "--steps 1 --batch 2 --micro-batch 2 --max-length 96 --eval-examples 0 --warmup-steps 0"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    return file


def test_an_adapter_trained_on_messages_is_asked_in_its_template(
    run_copy: Path, base: Path, chats: Path, tmp_path: Path, capsys
):
    adapter, recovered = tmp_path / "adapter", tmp_path / "recovered"
    train = ["train", "--run", run_copy, "--data", chats, "--chat-template", "chatml", *FIT.split()]
    assert run_command([*map(str, [*train, "--out", adapter])]) == 0
    recover = ["recover", "--run", run_copy, "--in", adapter, "--out", recovered]
    assert run_command([*map(str, recover)]) == 0
    template = (adapter / "chat_template.jinja").read_text()
    assert "<|im_start|>" in template
    assert (recovered / "chat_template.jinja").read_text() == template
    questions = tmp_path / "test.jsonl"
    rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(2)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "eval"
    words = ["eval", "--run", run_copy, "--rows", "base", "--row", f"mine={base}+{recovered}"]
    words += ["--tasks", "lm_eval:gsm8k", "--task-data", f"lm_eval:gsm8k={questions}"]
    words += ["--num-fewshot", "1", "--max-new-tokens", "2", "--limit", "1", "--out", out]
    capsys.readouterr()
    assert run_command([*map(str, words)]) == 0
    assert "asked by the chat template: mine; as plain text: base" in capsys.readouterr().out
    asked = {
        label: json.loads((out / f"samples-{label}.jsonl").read_text().splitlines()[0])["prompt"]
        for label in ("base", "mine")
    }
    assert asked["mine"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert asked["mine"].count("<|im_start|>user") == 2
    assert "<|im_start|>" not in asked["base"]
    assert Manifest.read(out).inputs["row mine"]["asked"] == "chat template"
    spec = EvalSpec(model=base, out=out, rows={"base": (base,)}, apply_chat_template="on")
    assert as_chat(spec, (base,))
    # The base of these tests has no template to be asked by.
    again = [*map(str, words), "--apply-chat-template", "on", "--force"]
    assert run_command(again) == UsageError.exit_code
    assert "the tokenizer of row base has no chat template" in capsys.readouterr().err
