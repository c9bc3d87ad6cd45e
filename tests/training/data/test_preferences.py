import json
import re

import pytest

from loram_cli.demo.problems import load_demo
from loram_cli.errors import LoramError
from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.preferences import Preference, load_preferences, tokenize_pairs
from loram_cli.training.data.questions import Question, fitting_questions, load_questions


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def sides(pair):
    return pair.chosen.prompt, pair.chosen.completion, pair.rejected.completion


SIDES = {"chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("row", "same_as"),
    [
        ({"prompt": "Well? ", **SIDES}, {"prompt": "Well? ", "completion": "yes"}),
        ({"question": "Well?", **SIDES}, {"question": "Well?", "answer": "yes"}),
        (
            {"instruction": "Say", "input": "it", **SIDES},
            {"instruction": "Say", "input": "it", "output": "yes"},
        ),
        ({"prompt": [user("Well?")], **SIDES}, {"messages": [user("Well?"), assistant("yes")]}),
        (
            {
                "prompt": [user("Well?")],
                "chosen": [assistant("yes")],
                "rejected": [assistant("no")],
            },
            {"messages": [user("Well?"), assistant("yes")]},
        ),
        # A whole conversation on either side, as in UltraFeedback.
        (
            {
                "prompt": "Well?",
                "chosen": [user("Well?"), assistant("yes")],
                "rejected": [user("Well?"), assistant("no")],
            },
            {"messages": [user("Well?"), assistant("yes")]},
        ),
        # LLaMA-Factory's own.
        (
            {
                "conversations": [{"from": "human", "value": "Well?"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            {"messages": [user("Well?"), assistant("yes")]},
        ),
    ],
)
def test_prompts_and_answers_read_as_in_supervised_tuning(write, row, same_as):
    (pair,) = load_preferences(write(row))
    (example,) = load_instructions(write(same_as))
    assert pair.chosen == example
    assert pair.rejected.prompt == example.prompt
    assert pair.rejected.completion.strip() == "no"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: field 'rejected' of a preference is missing"),
        ({"prompt": "a", "rejected": "b"}, "line 2: field 'chosen' of a preference is missing"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "line 2: no prompt"),
    ],
)
def test_what_is_missing_is_named_with_its_line(write, row, said):
    source = write({"prompt": "a", **SIDES}, row)
    with pytest.raises(LoramError, match=said):
        load_preferences(source)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "1 left out: 'chosen' is null .*line 2"),
        ({"prompt": [user("a")], "chosen": [{"x": 1}], "rejected": "b"}, "line 2, message 2"),
    ],
)
def test_what_cannot_be_learnt_is_left_out_and_counted(write, reporter, row, said):
    source = write({"prompt": "a", **SIDES}, row)
    assert len(load_preferences(source, reporter=reporter)) == 1
    assert re.search(said, reporter.warnings[0])


def test_numbers_are_read_as_text(write, reporter):
    source = write({"prompt": 1, "chosen": 2, "rejected": "no", "system": "Be brief."})
    assert sides(load_preferences(source, reporter=reporter)[0]) == ("Be brief.\n\n1", "2", "no")
    assert any("field 'chosen' is no text" in line for line in reporter.warnings)


def test_an_answer_that_looks_like_json_is_text(write):
    source = write({"prompt": "[1, 2]", "chosen": '{"a": 1}', "rejected": '[{"b": 2}]'})
    assert sides(load_preferences(source)[0]) == ("[1, 2]", '{"a": 1}', '[{"b": 2}]')


def test_pairs_without_a_difference_are_left_out_with_a_warning(write, reporter):
    source = write({"prompt": "a", **SIDES}, {"prompt": "b", "chosen": "x", "rejected": "x "})
    assert len(load_preferences(source, reporter=reporter)) == 1
    assert "1 left out: chosen and rejected are the same" in reporter.warnings[0]
    assert "line 2" in reporter.warnings[0]
    with pytest.raises(LoramError, match="no preferences"):
        load_preferences(write({"prompt": "b", "chosen": "x", "rejected": "x"}))


def pair(prompt, chosen, rejected):
    from loram_cli.training.data.layouts import Example

    return Preference(Example(prompt, chosen), Example(prompt, rejected))


def test_rows_are_the_tokens_of_supervised_tuning(tokenizer, reporter):
    (row,) = tokenize_pairs([pair("Well?", " yes", " yet no")], tokenizer, 64, reporter)
    whole = tokenizer("Well? yes")["input_ids"]
    assert [*row.prompt_ids, *row.chosen_ids] == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(row.rejected_ids[:-1]) == " yet no"
    assert row.prompt_ids[0] == tokenizer.bos_token_id
    assert not reporter.warnings


def test_long_pairs_are_cut_and_those_without_a_difference_dropped(tokenizer, reporter):
    pairs = [pair("a", "x" * 20 + "1", "x" * 20 + "2"), pair("a", "1" * 20, "2" * 20)]
    (row,) = tokenize_pairs(pairs, tokenizer, 12, reporter)
    assert len(row.prompt_ids) + len(row.chosen_ids) == 12
    assert "2 of 2 pairs are longer than 12 tokens and were cut, 1 of them" in reporter.warnings[0]
    with pytest.raises(LoramError, match="longer --max-length"):
        try:
            tokenize_pairs(pairs[:1], tokenizer, 12, reporter)
        except LoramError as error:
            raise LoramError(error.hint) from error


def test_the_demo_pairs_are_two_ways_to_write_the_same_solution():
    right = load_demo("train")[:300]
    for record, solved in zip(load_demo("preferences")[:300], right, strict=True):
        assert record["prompt"] == f"Question: {solved['question']}\nAnswer:"
        assert record["chosen"] == f" {solved['answer']}"
        number = solved["answer"].rpartition("#### ")[2]
        assert record["rejected"].endswith(f" The answer is {number}.")
        assert "<<" not in record["rejected"]
    questions = {r["prompt"] for r in load_demo("preferences")}
    assert not questions & {r["prompt"] for r in load_demo("preferences-test")}


def test_the_demo_slips_differ_in_the_sums_alone():
    import re

    chosen = load_demo("train")[:300]
    for record, right in zip(load_demo("slips")[:300], chosen, strict=True):
        assert record["prompt"] == f"Question: {right['question']}\nAnswer:"
        assert record["chosen"] == f" {right['answer']}"
        words = [re.sub(r"\d+", "N", record[side]) for side in ("chosen", "rejected")]
        assert words[0] == words[1]
        numbers = [record[side].rpartition("#### ")[2] for side in ("chosen", "rejected")]
        assert numbers[0] != numbers[1]
        assert int(numbers[1]) > 0


def test_questions_are_rendered_as_in_supervised_tuning(write):
    source = write({"question": "How many?", "answer": "Two.\n#### 2"})
    (question,) = load_questions(source)
    (example,) = load_instructions(source)
    assert question == Question(example.prompt, "Two.\n#### 2")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a"}, "line 2: field 'answer' is missing"),
        ({"prompt": "a", "completion": "b"}, "line 2: field 'question' is missing"),
        ({"question": "a", "answer": "two"}, "line 2: the answer does not end in '#### N'"),
        ({"question": "a", "answer": "#### none"}, "line 2: the answer does not end in '#### N'"),
    ],
)
def test_answers_that_cannot_be_checked_are_named(write, row, said):
    with pytest.raises(LoramError, match=said):
        load_questions(write({"question": "a", "answer": "#### 1"}, row))


def test_a_number_is_an_answer_and_a_null_is_left_out(write, reporter):
    source = write({"question": "a", "answer": 2}, {"question": "b", "answer": None})
    assert [q.answer for q in load_questions(source, reporter=reporter)] == ["#### 2"]
    assert "1 left out: 'answer' is null" in reporter.warnings[0]
    assert "read as '#### N' (1 times" in reporter.warnings[1]


def test_prompts_for_own_rewards_come_in_any_layout_with_their_fields(write, tokenizer, reporter):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    source = write(
        {"prompt": "p", "solution": 3},
        {"messages": turns, "solution": "x"},
        {"prompt": turns[:1], "answer": "y"},
        {"instruction": "i", "input": "", "output": "o"},
        {"question": "q", "answer": "no number"},
    )
    found = load_questions(
        source, tokenizer=tokenizer, numbers=False, own_rewards=True, reporter=reporter
    )
    assert [q.prompt[:20] for q in found[:3]] == ["p", *["User: u\nAssistant:"] * 2]
    assert found[3].prompt.endswith("### Instruction:\ni\n\n### Response:\n")
    assert found[4].prompt == "Question: q\nAnswer:"
    assert [dict(q.fields) for q in found[:3]] == [
        {"solution": 3}, {"messages": turns, "solution": "x"}, {"answer": "y"}
    ]  # fmt: skip
    assert [q.answer for q in found] == [""] * 5
    with pytest.raises(LoramError, match="line 1: no prompt"):
        load_questions(write({"text": "a"}), numbers=False, own_rewards=True)


def test_questions_too_long_are_left_out(reporter):
    questions = [Question(str(i), "#### 1") for i in range(3)]
    assert fitting_questions(questions, [3, 9, 4], 4, reporter) == [questions[0], questions[2]]
    assert "1 of 3 questions left out" in reporter.warnings[0]
    with pytest.raises(LoramError, match="no question is shorter than 2 tokens"):
        fitting_questions(questions, [3, 9, 4], 2, reporter)
