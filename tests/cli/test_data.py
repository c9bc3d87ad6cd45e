"""``loram data``: what training would learn, by the tokenizer alone."""

import json

from loram_cli.cli.app import run_command

ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"question": "How many?", "answer": None},
]


def test_rows_are_shown_with_what_is_learnt_marked(tmp_path, capsys, monkeypatch):
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["data", str(data), "--chat-template", "chatml"]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦yes<|im_end|>⟧" in out
    assert f"1: 'answer' is null (the first: {data}, line 2)" in out
    # The demo's own recipe cuts at 192, and settings of train hold here.
    assert "cut at 192" in out
    monkeypatch.setenv("LORAM_TRAIN_MAX_LENGTH", "4")
    assert run_command([*words, "--json", "-n", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["kept"], found["rows"]) == (1, 0, [])
    assert found["dropped"]["no answer is left within 4 tokens"]["number"] == 1
    assert run_command(["data", str(tmp_path / "none.jsonl")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_answers_of_other_objectives_are_shown_with_what_is_unlearnt(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Ann", "chosen": " reads", "rejected": " sleeps"}
    data.write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "chosen": None}) + "\n")
    assert run_command(["data", str(data), "--objective", "dpo"]) == 0
    out = capsys.readouterr().out
    assert "1, chosen" in out and "⟦ reads" in out
    assert "1, rejected" in out and "⟦- sleeps" in out
    assert "what is unlearnt" in out
    assert "1 left out: 'chosen' is null" in out
    assert run_command(["data", str(data), "--objective", "kto", "-n", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], len(found["rows"])) == (2, 1)
    data.write_text(json.dumps({"prompt": "Count to 3", "level": 1}) + "\n")
    (tmp_path / "r.py").write_text("raise SystemExit('it ran')\ndef f(completions): ...\n")
    words = ["data", str(data), "--objective", "grpo", "--reward", f"{tmp_path}/r.py:f"]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert "Count to 3" in out and "0 learnt" in out


def test_a_setting_that_training_would_refuse_is_refused(capsys):
    assert run_command(["data", "demo:train", "--reward", "nonsense"]) == 2
    assert "--reward does not go with --objective sft" in capsys.readouterr().err
