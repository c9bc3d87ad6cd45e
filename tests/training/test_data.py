import gzip
import json
from pathlib import Path

import pytest
from conftest import save_tokenizer

from loram_cli.errors import LoramError
from loram_cli.modeling.narrow import load_tokenizer
from loram_cli.reporting import NullReporter
from loram_cli.training.data import (
    IGNORED_LABEL,
    Example,
    encode_examples,
    load_instructions,
    load_text,
    pack_blocks,
)

SILENT = NullReporter()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return load_tokenizer(directory)


def write(tmp_path: Path, *rows: object) -> str:
    file = tmp_path / "data.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(file)


@pytest.mark.parametrize(
    ("record", "example"),
    [
        ({"prompt": "p", "completion": "c"}, Example("p", "c")),
        ({"question": "q", "answer": "a"}, Example("Question: q\nAnswer:", " a")),
        (
            {"instruction": "i", "output": "o"},
            Example("### Instruction:\ni\n\n### Response:\n", "o"),
        ),
    ],
)
def test_layouts(tmp_path: Path, tokenizer, record, example):
    assert load_instructions(write(tmp_path, record), tokenizer, SILENT) == [example]


def test_every_assistant_turn_is_an_example(tmp_path: Path, tokenizer):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "sure")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns]}
    examples = load_instructions(write(tmp_path, record), tokenizer, SILENT)
    assert [e.completion for e in examples] == ["hello", "sure"]
    assert examples[1].prompt == "User: hi\nAssistant: hello\nUser: more\nAssistant: "


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{broken"], "line 1: not valid JSON"),
        (
            [{"prompt": "p", "completion": "c"}, {"text": "x"}],
            "line 2: fields text; prompt/completion",
        ),
        ([{"prompt": "p", "completion": 3}], "line 1: field 'completion' must be text"),
        ([{"prompt": "p", "completion": " "}], "line 1: the answer is empty"),
        (["[1, 2]"], "line 1: a JSON object is wanted"),
        ([], "no examples"),
    ],
)
def test_bad_rows_name_their_line(tmp_path: Path, tokenizer, rows, message):
    with pytest.raises(LoramError, match=message):
        load_instructions(write(tmp_path, *rows), tokenizer, SILENT)


def test_broken_utf8_and_missing_files(tmp_path: Path, tokenizer):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(LoramError, match="line 2: not UTF-8"):
        load_text(str(tmp_path / "data.jsonl"))
    with pytest.raises(LoramError, match="no such file or folder"):
        load_text(str(tmp_path / "gone.txt"))


def test_text_sources(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write('{"text": "three"}\n')
    assert load_text(str(tmp_path)) == ["one", "two", "three"]
    assert load_text("demo:calibration")


def test_loss_is_on_the_answer_alone(tokenizer):
    rows = encode_examples([Example("ab", "cd")], tokenizer, 64, answer_only=True, reporter=SILENT)
    assert rows[0]["labels"][:2] == [IGNORED_LABEL] * 2
    assert rows[0]["labels"][2:] == rows[0]["input_ids"][2:]
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id
    everything = encode_examples(
        [Example("ab", "cd")], tokenizer, 64, answer_only=False, reporter=SILENT
    )
    assert everything[0]["labels"] == everything[0]["input_ids"]


def test_an_answer_that_is_cut_off_is_dropped(tokenizer):
    with pytest.raises(LoramError, match="--max-length"):
        encode_examples([Example("a" * 9, "b")], tokenizer, 8, answer_only=True, reporter=SILENT)


def test_packing_loses_less_than_a_block(tokenizer):
    texts = ["abcdefg"] * 10
    blocks = pack_blocks(texts, tokenizer, 16)
    assert len(blocks) == 10 * 8 // 16
    assert all(len(b["input_ids"]) == 16 for b in blocks)
    with pytest.raises(LoramError, match="less than one block"):
        pack_blocks(["a"], tokenizer, 16)
