import json
from pathlib import Path

from loram_cli.cli.app import run_command
from loram_cli.training.data.markers import foreign_markers

TRAIN = ["--steps", "1", "--batch", "2", "--micro-batch", "2", "--max-length", "64"]


def test_training_with_another_chat_template_than_the_bases_warns(
    run_copy: Path, instructions: Path, capsys
):
    words = ["train", "--run", run_copy, "--data", instructions, *TRAIN, "--force"]
    (run_copy / "aligned" / "chat_template.jinja").write_text("{{ messages }}")
    assert run_command([str(word) for word in words]) == 0
    assert "is not that of the base" in capsys.readouterr().err
    assert run_command(["recover", "--run", str(run_copy), "--force"]) == 0
    assert "serve the adapter with the template" in capsys.readouterr().err


def test_no_warning_where_nothing_differs(run_copy: Path, capsys):
    assert run_command(["recover", "--run", str(run_copy), "--force"]) == 0
    assert "chat template" not in capsys.readouterr().err


def test_text_in_another_models_chat_format_warns(run_copy: Path, tmp_path: Path, capsys):
    data = tmp_path / "chat.jsonl"
    row = {"prompt": "<|im_start|>user\nhello<|im_end|>", "completion": "hi"}
    data.write_text((json.dumps(row) + "\n") * 8)
    words = ["train", "--run", run_copy, "--data", data, *TRAIN, "--force"]
    assert run_command([str(word) for word in words]) == 0
    assert "<|im_start|> are not tokens of this model" in capsys.readouterr().err


def test_markers_that_the_tokenizer_knows_are_its_own():
    class Tokenizer:
        def get_vocab(self):
            return {"<|im_start|>": 5}

    texts = ["<|im_start|>user", "a < b", "<start_of_turn>model"]
    assert foreign_markers(texts, Tokenizer()) == ("<start_of_turn>",)
