import gzip
import json
from pathlib import Path

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.training.data import records
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.documents import (
    Example,
    load_instructions,
    load_text,
    split_eval,
)
from loram_cli.training.data.layouts import asked


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(record) + "\n" for record in content)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


def test_text_file_is_cut_at_two_blank_lines_and_keeps_paragraphs_together(write):
    source = write("a.txt", "one\n\nstill one\n\n \n\ntwo\n<|endoftext|>three\n")
    assert load_text(source) == ["one\n\nstill one", "two\n", "three\n"]


def test_long_text_is_cut_at_line_ends_and_nothing_is_lost(write):
    text = "".join(f"line {i} of a long document\n" for i in range(3000))
    documents = load_text(write("long.txt", text))
    assert len(documents) > 3
    assert "".join(documents) == text
    assert all(document.endswith("\n") for document in documents)


def test_text_without_any_line_end_is_cut_all_the_same(write):
    assert [len(d) for d in load_text(write("a.txt", "x" * 50_001))] == [20_000, 20_000, 10_001]


def test_folder_is_read_in_the_order_of_its_names(write, tmp_path):
    write("corpus/b.jsonl", [{"text": "second"}, {"text": "third"}])
    write("corpus/a.txt", "first")
    write("corpus/sub/c.txt.gz", "fourth")
    write("corpus/notes.md", "not data")
    assert load_text(str(tmp_path / "corpus")) == ["first", "second", "third", "fourth"]


def test_json_list_and_parquet_give_their_text(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    assert load_text(write("a.json", json.dumps([{"text": "x"}, {"text": "y"}]))) == ["x", "y"]
    assert load_text(write("lines.json", [{"text": "x"}, {"text": "y"}])) == ["x", "y"]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"]}), path)
    assert load_text(str(path)) == ["p", "q"]


def test_limit_and_empty_documents(write, reporter):
    source = write("a.jsonl", [{"text": "x"}, {"text": " "}, {"text": "y"}, {"text": "z"}])
    assert load_text(source, reporter=reporter) == ["x", "y", "z"]
    assert "1 empty" in reporter.warnings[0]
    assert load_text(source, limit=1) == ["x"]


def test_instruction_records_serve_as_text(write):
    source = write("a.jsonl", [{"question": "2+2?", "answer": "4"}])
    assert load_text(source) == ["Question: 2+2?\nAnswer: 4"]


def test_demo_sets_load():
    assert load_text("demo:calibration", limit=3)
    first = load_instructions("demo:train", limit=3)[0]
    assert first.prompt.startswith("Question: ")
    with pytest.raises(UsageError, match="demo:nothing"):
        load_text("demo:nothing")


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"question": "a", "answer": "b"}, "Question: a\nAnswer:", " b"),
        (
            {"instruction": "Add.", "output": "b"},
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
            "b",
        ),
        (
            {"instruction": "Add {x}.", "input": "1 {y}", "output": "b"},
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {x}.\n\n### Input:\n1 {y}\n\n### Response:\n",
            "b",
        ),
    ],
)
def test_layouts(write, record, prompt, completion):
    assert load_instructions(write("a.jsonl", [record])) == [Example(prompt, completion)]


def test_gsm8k_layout_is_lm_evals(shared_file):
    import lm_eval.tasks
    import yaml

    folder = next(iter(lm_eval.tasks.__path__))
    task = yaml.safe_load((Path(folder) / "gsm8k" / "gsm8k.yaml").read_text())
    example = load_instructions(str(shared_file("data/gsm8k_train.jsonl")), limit=1)[0]
    question = example.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    assert task["doc_to_text"].replace("{{question}}", question) == example.prompt
    assert example.completion.startswith(" ")


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


def test_messages_without_template_fall_back_and_warn(write, tokenizer, reporter):
    source = write("a.jsonl", [{"messages": MESSAGES}])
    examples = load_instructions(source, tokenizer=tokenizer, reporter=reporter)
    (example,) = examples
    assert example.text == (
        "System: Be brief.\nUser: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant: Ciao"
    )
    assert [example.text[a:b] for a, b in example.spans] == [" Hello</s>", " Ciao"]
    assert "no chat template" in reporter.warnings[0]


def test_messages_go_through_the_chat_template(write, tokenizer, reporter):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    source = write("a.jsonl", [{"conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}])  # fmt: skip
    examples = load_instructions(source, tokenizer=chatty, reporter=reporter)
    assert examples == [Example("<s>[user]Hi</s>[assistant]", "Hello</s>", special_tokens=False)]
    assert not reporter.warnings


def test_a_prompt_opens_the_answers_turn_as_it_was_learnt_or_as_the_template_does(tokenizer):
    import copy

    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    chat = Chat(thinking)
    # A finished turn has no thought in it, and is what an adapter learnt from.
    assert asked("Hi", "messages", chat) == Example("[user]Hi[assistant]", "", False)
    own = asked("Hi", "messages", chat, learnt=False)
    assert own == Example("[user]Hi[assistant]<think>", "", False)
    assert asked("Hi", "question", chat, learnt=False).prompt == "Question: Hi\nAnswer:"
    plain = asked("Hi", "messages", Chat(tokenizer), learnt=False)
    assert plain.prompt == "User: Hi\nAssistant:"


def test_a_template_that_refuses_is_one_clear_line(write, tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(LoramError, match=r"line 1: the chat template refuses it \(no system role"):
        load_instructions(write("a.jsonl", [{"messages": MESSAGES}]), tokenizer=strict)


def test_empty_answers_are_left_out_with_a_warning(write, reporter):
    records = [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}]
    assert len(load_instructions(write("a.jsonl", records), reporter=reporter)) == 1
    assert "1 left out: the answer is empty" in reporter.warnings[0]


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", GOOD + '{"prompt": \n', r"a\.jsonl, line 2: broken JSON"),
        ("a.jsonl", GOOD + "\n[1]\n", r"line 3: expected an object .* not a list"),
        ("a.jsonl", GOOD + '{"promt": "a", "completion": "b"}', r"line 2: no known layout \(fie"),
        ("a.jsonl", '{"prompt": "a", "completion": {}}', r"line 1: field 'completion' must be te"),
        ("a.jsonl", '{"question": null, "answer": "3"}', r"line 1: 'question' is null"),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "\xff"}', r"line 2: not UTF-8 .*0xff"),
        ("a.jsonl", "", r"a\.jsonl: no examples"),
        ("a.jsonl", '{"messages": []}', r"line 1: field 'messages' must be a list of messages"),
        ("a.jsonl", '{"messages": 3}', r"line 1: field 'messages' must be a list of messages"),
        ("a.jsonl", '{"messages": [3]}', r"line 1, message 1: a message of 'messages' needs"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1, message 1: .* needs 'role'"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', r"no message of the assis"),
        ("a.jsonl", "[" * 100_000, r"line 1: JSON is nested too deeply"),
        ("a.json", '[{"prompt": "a",\n "completion" "b"}]', r"a\.json, line 2: broken JSON"),
        ("a.json", '[\n\n{"prompt": }]', r"a\.json, line 3: broken JSON"),
        ("a.json", GOOD + '\n{"prompt": "a",\n]', r"a\.json, line 4: broken JSON"),
        ("a.json", '"prompt"', r"expected a list of records, not text"),
        ("a.json", '[{"text": "a"}', r"a\.json, line 1: broken JSON \(Expecting ','"),
        ("a.json", '[{"text": "a"}] 1', r"a\.json, line 1: text after the end of the list"),
        ("a.json", "[" * 100_000, r"line 1: JSON is nested too deeply"),
        ("a.json", "", r"a\.json, line 1: broken JSON"),
        ("a.jsonl", GOOD + '{"prompt": "a", "completion": "\\ud800"}', r"line 2: text with half"),
        ("a.json", '[{"prompt": "a",\n "completion": "\\udc00"}]', r"line 1: text with half"),
        ("a.jsonl", '{"prompt": "a", "completion": %s}' % ("1" * 5000), r"line 1: a whole number"),
        ("a.csv", 'prompt,completion\na,b\na,b,c\n', r"a\.csv, line 3: 3 cells, .* 2 columns"),
        ("a.csv", 'prompt,completion\na,"b', r"a\.csv, line 2: not a readable table"),
        ("a.csv", 'prompt,prompt\na,b', r"a\.csv, line 1: two columns of the same name"),
        ("a.parquet", "no parquet at all", r"a\.parquet: not a readable parquet file"),
        ("a.jsonl.gz", None, r"a\.jsonl\.gz: cannot be read"),
        ("a.txt", "plain", r"a\.txt: plain text where records are expected"),
        ("a.xml", "x", r"a\.xml: unknown kind of data file"),
    ],
)  # fmt: skip
def test_bad_instruction_data_is_one_clear_line(tmp_path, name, content, says):
    path = tmp_path / name
    if content is None:
        path.write_bytes(gzip.compress(GOOD.encode() * 50)[:-12])
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoramError, match=says) as caught:
        load_instructions(str(path))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("source", ["missing.jsonl", "/nowhere/data", "./x", "a/b/c"])
def test_missing_local_source(source):
    with pytest.raises(LoramError, match="no such file or folder"):
        load_instructions(source)


def test_empty_text_sources(write, tmp_path):
    with pytest.raises(LoramError, match="no text in it"):
        load_text(write("a.txt", " \n\n\n\n"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoramError, match="holds no data file"):
        load_text(str(tmp_path / "empty"))
    with pytest.raises(LoramError, match=r"line 1: no field 'text' \(fields: body\)"):
        load_text(write("b.jsonl", [{"body": "x"}]))


@pytest.fixture
def hub_answers(monkeypatch):
    monkeypatch.setattr(records, "unreachable", lambda: None)


def test_hub_failure_is_one_line(monkeypatch, hub_answers):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(LoramError, match="the hub did not give it") as caught:
        load_instructions("owner/name:main@test")
    assert "long trace" not in str(caught.value)


def test_hub_id_carries_config_and_split(monkeypatch, hub_answers):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"question": str(i), "answer": "b"} for i in range(9)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_instructions("openai/gsm8k:main@test", limit=4)) == 4
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "streaming": True})]


def test_split_is_disjoint_whole_and_seeded():
    items = list(range(100))
    train, evaluation = split_eval(items, 0.1, seed=1)
    assert len(evaluation) == 10
    assert sorted(train + evaluation) == items
    assert (train, evaluation) == split_eval(items, 0.1, seed=1)
    assert evaluation != split_eval(items, 0.1, seed=2)[1]
    assert len(split_eval(items, 7, seed=1)[1]) == 7
    assert split_eval(items, 0, seed=1) == (items, [])
    assert len(split_eval([1, 2, 3], 0.01, seed=1)[1]) == 1


@pytest.mark.parametrize("share", [-0.1, 1.5, 100])
def test_split_that_cannot_be(share):
    with pytest.raises(UsageError, match="evaluation split"):
        split_eval(list(range(100)), share, seed=0)
