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
