"""Judged answers: their layouts, their labels, and what each side weighs."""

import json

import pytest

from loram_cli.errors import LoramError
from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.judged import load_judged, side_weights, tokenize_judged
from loram_cli.training.data.tokens import tokenize_examples


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "judged.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_every_layout_and_label_in_the_wild(write, tokenizer):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = load_judged(
        write(
            {"prompt": "p", "completion": "c", "label": True},
            {"prompt": turns[:1], "completion": turns[1:], "label": False},
            {"messages": turns, "kto_tag": "false"},
            {"instruction": "i", "output": "o", "label": 1},
            {"question": "x", "answer": "y", "label": "thumbs_down"},
            {"prompt": "p", "chosen_response": "good", "rejected_response": "bad"},
        ),
        tokenizer=tokenizer,
    )
    assert [answer.good for answer in found] == [True, False, False, True, False, True, False]
    assert [answer.completion for answer in found][-2:] == ["good", "bad"]
    assert found[1].example == found[2].example
    (same,) = load_instructions(write({"question": "x", "answer": "y"}))
    assert found[4].example == same


def test_tokens_are_those_of_supervised_tuning(write, tokenizer, reporter):
    found = load_judged(
        write(
            {"prompt": "ab", "completion": "cd", "label": True},
            {"prompt": "a" * 40, "completion": "b", "label": False},
            {"prompt": "ab", "completion": "e" * 40, "label": False},
        )
    )
    rows = tokenize_judged(found, tokenizer, 16, reporter)
    assert [row.good for row in rows] == [True, False]
    wanted = tokenize_examples([found[0].example], tokenizer, 16, reporter)[0]
    assert [*rows[0].prompt_ids, *rows[0].completion_ids] == wanted.input_ids.tolist()
    assert len(rows[0].prompt_ids) == wanted.answer_start
    assert (
        "2 of 3 answers are longer than 16 tokens and were cut, 1 of them" in reporter.warnings[0]
    )
    assert side_weights(rows) == (1.0, 1.0)
    assert side_weights([rows[0], rows[0], rows[0], rows[1]]) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "completion": "c"}, "line 2: no 'label'"),
        ({"prompt": "p", "completion": "c", "label": "maybe"}, "line 2: 'label' is neither"),
        ({"prompt": "p", "completion": "c", "label": True}, "all 2 answers are good"),
        ({"prompt": "p", "completion": "c", "label": None}, "all 1 answers are good"),
    ],
)
def test_what_cannot_be_learnt_is_named(write, row, said):
    with pytest.raises(LoramError, match=said):
        load_judged(write({"prompt": "p", "completion": "c", "label": True}, row))
