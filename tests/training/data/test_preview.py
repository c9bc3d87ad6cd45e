import json

import pytest

from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.preview import Segment, preview
from loram_cli.training.data.tokens import tokenize_examples


@pytest.fixture
def source(tmp_path):
    rows = [
        {"prompt": "ab", "completion": "cd", "id": 1},
        {"prompt": "ab", "completion": None},
        {"prompt": "a" * 40, "completion": "b"},
        {"prompt": "ab", "completion": "c" * 40},
        {"conversations": [
            {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"},
        ]},
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_preview_shows_what_training_learns(source, tokenizer, reporter):
    seen = preview(source, tokenizer, max_length=32, rows=2)
    assert (seen.examples, seen.kept, seen.cut) == (4, 3, 3)
    first, second = seen.rows
    assert first.segments == (Segment("<s>ab", False), Segment("cd</s>", True))
    assert (first.tokens, first.learnt_tokens, first.cut) == (6, 3, False)
    assert (second.tokens, second.cut) == (32, True)
    assert second.where.endswith("a.jsonl, line 4")
    assert {k: (c.number, c.first[-6:]) for k, c in seen.dropped.items()} == {
        "'completion' is null": (1, "line 2"),
        "no answer is left within 32 tokens": (1, "line 3"),
    }
    assert list(seen.unused) == ["'id'"] and not seen.has_template


def test_its_counts_are_those_of_training(source, tokenizer, reporter):
    for train_on, on_prompt in (("all", False), ("last", False), ("all", True)):
        seen = preview(
            source, tokenizer, max_length=64, train_on=train_on, loss_on_prompt=on_prompt
        )
        examples = load_instructions(source, tokenizer=tokenizer, train_on=train_on)
        rows = tokenize_examples(examples, tokenizer, 64, reporter, loss_on_prompt=on_prompt)
        assert seen.kept == len(rows) == 4
        assert seen.learnt_tokens == sum(row.learnt_tokens() for row in rows)
        assert seen.tokens == sum(len(row.input_ids) for row in rows)
        shown = "".join(segment.text for segment in seen.rows[-1].segments)
        assert shown == tokenizer.decode(rows[-1].input_ids)


def test_nothing_to_learn_is_shown_and_no_error(source, tokenizer):
    seen = preview(source, tokenizer, max_length=2)
    assert (seen.kept, seen.rows, seen.learnt_tokens) == (0, (), 0)
    assert sum(count.number for count in seen.dropped.values()) == 5
