import csv
import json

import numpy as np
import pytest

from loram_cli.demo.problems import load_demo
from loram_cli.errors import LoramError
from loram_cli.training.data.documents import load_instructions, load_text, source_layout
from loram_cli.training.data.tokens import encode_prompt, tokenize_examples


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def learnt(example):
    return [example.text[begin:end] for begin, end in example.spans]


@pytest.fixture
def load(tokenizer, reporter):
    def load(source, **settings):
        return load_instructions(source, tokenizer=tokenizer, reporter=reporter, **settings)

    return load


def test_alpaca_system_and_history_are_used_and_every_answer_is_learnt(write, load, reporter):
    record = {
        "instruction": "Say hi",
        "input": "",
        "output": "hi",
        "system": "You are a pirate",
        "history": [["who are you", "I am Tom"]],
    }
    (example,) = load(write(record))
    assert example.text == (
        "You are a pirate\n\n### Instruction:\nwho are you\n\n### Response:\nI am Tom</s>\n\n"
        "### Instruction:\nSay hi\n\n### Response:\nhi"
    )
    assert learnt(example) == ["I am Tom</s>", "hi"]
    assert learnt(load(write(record), train_on="last")[0]) == ["hi"]
    assert not reporter.warnings


def test_sharegpt_system_comes_first_and_gpt_is_the_assistant(write, load):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    said = "System: Be a pirate\nUser: hi\nAssistant: yo"
    (field,) = load(write({"conversations": turns, "system": "Be a pirate"}))
    (turn,) = load(write({"conversations": [{"from": "system", "value": "Be a pirate"}, *turns]}))
    assert field.text == turn.text == said
    (plain,) = load(write({"conversations": turns, "system": None}))
    assert plain.text == "User: hi\nAssistant: yo"


def test_a_turn_of_weight_0_is_context(write, load):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "BAD", "weight": 0},
        {"role": "user", "content": "hm"},
        {"role": "assistant", "content": "good", "weight": 1},
    ]
    (example,) = load(write({"messages": turns}))
    assert "BAD" in example.prompt and learnt(example) == [" good"]
    turns[1] = {"role": "assistant", "content": "BAD", "train": False}
    assert learnt(load(write({"messages": turns}))[0]) == [" good"]
    turns[3]["weight"] = 0
    with pytest.raises(LoramError, match="line 1: 'messages' has only turns that are not to be le"):
        load(write({"messages": turns}))


def test_what_follows_the_last_turn_to_learn_is_left_off(write, load):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (example,) = load(write({"conversations": [*turns, {"from": "human", "value": "c"}]}))
    assert example.text == "User: a\nAssistant: b"


def test_text_parts_are_joined_and_others_refused_with_their_line(write, load):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "c"}]}
    (example,) = load(write({"messages": [{"role": "user", "content": parts}, answer]}))
    assert example.text == "User: ab\nAssistant: c"
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(LoramError, match="line 2, message 1: a part of type 'image_url'"):
        load(write({"text": "x"}, {"messages": [{"role": "user", "content": image}, answer]}))


def test_fields_that_are_not_used_are_told_once_with_their_count(write, load, reporter):
    rows = [{"prompt": "a", "completion": "b", "id": i, "note": "x" if i else None} for i in (0, 1)]
    load(write(*rows))
    (line,) = reporter.warnings
    assert line.endswith("fields not used, and in how many records: 'id' (2), 'note' (1)")


def test_nulls_are_absent_and_each_record_is_read_by_its_own_layout(write, load, reporter):
    source = write(
        {"messages": None, "instruction": "a", "input": None, "output": "b"},
        {"question": "2+2?", "answer": "4", "instruction": None, "output": None},
        {"conversations": [
            {"from": "human", "value": "hi", "role": None, "content": None},
            {"from": "gpt", "value": "yo", "role": None, "content": None},
        ]},
        {"text": "whole", "messages": None},
    )  # fmt: skip
    assert [learnt(example) for example in load(source)] == [["b"], [" 4"], [" yo"], ["whole"]]
    assert [line for line in reporter.warnings if "no chat template" not in line] == []


def test_parquet_columns_of_two_layouts_are_read_by_their_own(tmp_path, load):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"instruction": "a", "output": "b", "question": None, "answer": None},
        {"instruction": None, "output": None, "question": "2+2?", "answer": 4},
    ]
    path = tmp_path / "mixed.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [learnt(example) for example in load(str(path))] == [["b"], [" 4"]]


def test_null_and_numeric_answers_never_stop_a_file(write, load, reporter):
    rows = [{"question": "q", "answer": answer} for answer in ("a", None, 4, 2.5, [1], True)]
    assert [learnt(e) for e in load(write(*rows))] == [[" a"], [" 4"], [" 2.5"], [" true"]]
    assert [line.split(": ", 1)[1] for line in reporter.warnings] == [
        f"1 left out: 'answer' is null (the first: {write()}, line 2)",
        f"1 left out: field 'answer' must be text, not a list (the first: {write()}, line 5)",
        f"field 'answer' is no text and was read as text (3 times, the first: {write()}, line 3)",
    ]


def test_csv_and_tsv_with_messages_as_json_and_cells_of_several_lines(tmp_path, load):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["question", "answer", "messages"])
            writer.writerow(["How,\tmany?\nNow", "1", ""])
            writer.writerow(["", "", json.dumps(turns)])
        first, second = load(str(tmp_path / name))
        assert first.text == "Question: How,\tmany?\nNow\nAnswer: 1"
        assert second.text == "User: hi\nAssistant: yo"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_are_split_at_line_feeds_only(tmp_path, load, name):
    rows = [{"prompt": "a\u2028b\u0085", "completion": "c\x1c"}, {"prompt": "d", "completion": "e"}]
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert [e.text for e in load(str(path))] == ["a\u2028b\u0085c\x1c", "de"]


def test_json_lists_records_in_an_object_and_a_single_record(tmp_path, load):
    rows = [{"prompt": str(i), "completion": "x" * 2000} for i in range(1500)]
    path = tmp_path / "a.json"
    for text in (json.dumps(rows, indent=1), json.dumps({"version": "1", "data": rows})):
        path.write_text(text)
        assert [e.prompt for e in load(str(path))] == [row["prompt"] for row in rows]
    path.write_text(json.dumps(rows[0], indent=2))
    assert [e.prompt for e in load(str(path))] == ["0"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "a", "response": "b"}, "ab"),
        ({"question": "a", "response": "b", "system_prompt": "S"}, "S\n\nQuestion: a\nAnswer: b"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "User: a\nAssistant: b"),
        ({"text": "all of it"}, "all of it"),
    ],
)  # fmt: skip
def test_layouts_in_the_wild(write, load, record, text):
    assert load(write(record))[0].text == text


@pytest.mark.parametrize(
    ("record", "instruction", "context"),
    [
        ({"query": "a", "response": "b"}, "a", None),
        ({"input": "a", "output": "b"}, "a", None),
        ({"instruction": "a", "context": "c", "response": "b"}, "a", "c"),
    ],
)
def test_other_names_of_alpacas_fields(write, load, record, instruction, context):
    own = {"instruction": instruction, "input": context, "output": "b"}
    assert load(write(record)) == load(write(own))


def test_text_records_are_learnt_whole(write, load, tokenizer, reporter):
    source = write({"text": "ab"})
    assert source_layout(source) == "text"
    (row,) = tokenize_examples(load(source), tokenizer, 64, reporter)
    assert tokenizer.decode(row.input_ids) == "<s>ab</s>"
    assert row.learnt_tokens() == 3


def test_text_that_begins_with_bos_gets_no_second_one(write, load, tokenizer, reporter):
    record = {"prompt": "<s>[INST] Hi [/INST]", "completion": " Yo</s>"}
    (row,) = tokenize_examples(load(write(record)), tokenizer, 64, reporter)
    assert tokenizer.decode(row.input_ids) == "<s>[INST] Hi [/INST] Yo</s>"
    assert tokenizer.decode(row.input_ids[row.answer_start :]) == " Yo</s>"
    assert encode_prompt("<s>Hi", tokenizer) == encode_prompt("Hi", tokenizer)
    assert encode_prompt("<s>Hi", tokenizer, special_tokens=False)[:1] == [0]
    with pytest.raises(LoramError, match="the prompt is not UTF-8: its character 2 is half of one"):
        encode_prompt("a\udcff", tokenizer)


def test_the_demo_data_keeps_its_rows_and_masks(tokenizer, reporter):
    """Prompt and answer as one text with bos and eos, loss behind the prompt's own tokens."""
    examples = load_instructions("demo:train", limit=300)
    rows = tokenize_examples(examples, tokenizer, 4096, reporter)
    for row, record in zip(rows, load_demo("train"), strict=False):
        prompt = tokenizer(f"Question: {record['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {record['answer']}", add_special_tokens=False)["input_ids"]
        assert row.input_ids.tolist() == [*prompt, *answer, tokenizer.eos_token_id]
        assert (row.answer_start, row.given) == (len(prompt), ())
        wanted = np.where(np.arange(len(row.input_ids)) < len(prompt), -100, row.input_ids)
        assert np.array_equal(row.labels(), wanted)
    assert len(rows) == 300 and not reporter.warnings


def test_documents_of_any_layout_and_null_text(write, reporter):
    source = write({"text": None}, {"text": 3}, {"text": None, "prompt": "a", "completion": "b"})
    assert load_text(source, reporter=reporter) == ["3", "ab"]
    assert any("1 left out: 'text' is null" in line for line in reporter.warnings)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"inputs": "i", "targets": "t", "task": "x"}, ["t"]),
        ({"source": "i", "target": "t"}, ["t"]),
        ({"prompt": "i", "generation": "t"}, ["t"]),
        ({"Instruction": "i", "Response": "t"}, ["t"]),
        ({"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b</s>"}]}, ["b</s>"]),
        ({"conversation": [{"human": "a", "assistant": "b"}] * 2}, [" b</s>", " b"]),
        ({"messages": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]}, [" b"]),
    ],
)  # fmt: skip
def test_less_common_layouts(write, load, record, said):
    (example,) = load(write(record))
    assert learnt(example) == said


def test_a_question_is_asked_behind_what_it_is_about(write, load, reporter):
    (example,) = load(write({"context": "It rained.", "question": "Was it wet?", "answer": "Yes"}))
    assert example.prompt == "It rained.\n\nQuestion: Was it wet?\nAnswer:"
    assert not reporter.warnings


def test_a_table_with_semicolons_is_one(tmp_path, load):
    path = tmp_path / "a.csv"
    path.write_text('question;answer\n"a;b";c, d\n')
    (example,) = load(str(path))
    assert example.text == "Question: a;b\nAnswer: c, d"


def test_calls_are_written_as_text_where_the_template_takes_none(write, load, reporter):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "b"},
    ]
    (example,) = load(write({"messages": turns}))
    said = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert learnt(example) == [f" {said}</s>", " b"]
    assert "takes no tool calls" in reporter.warnings[0]
