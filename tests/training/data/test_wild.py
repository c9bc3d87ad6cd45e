"""Data files as they lie about, each learnt rightly or refused by one line that says why."""

import gzip
import io
import json

import pytest

from loram_cli.errors import LoramError
from loram_cli.training.data.documents import load_instructions, source_layout
from loram_cli.training.data.judged import load_judged
from loram_cli.training.data.preferences import load_preferences
from loram_cli.training.data.records import local_files

HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PAIR = {"prompt": "a", "completion": "b"}


def part(text, **more):
    return [{"type": "text", "value": text}], more


def learnt(example):
    return [example.text[begin:end] for begin, end in example.spans]


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


CONVERSATIONS = {
    "ShareGPT, raw": {"items": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    "UltraChat": {"id": "0", "data": ["hi", "yo"]},
    "LIMA": {"conversations": ["hi", "yo"]},
    "Capybara": {"conversation": [{"input": "hi", "output": "yo"}]},
    "lists of pairs": {"conversations": [["hi", "yo"]]},
    "Cohere": {"messages": [{"role": "User", "content": "hi"}, {"role": "Chatbot",
                                                                "content": "yo"}]},
    "capitals": {"messages": [{"role": "USER", "content": "hi"},
                              {"role": "ASSISTANT", "content": "yo"}]},
    "Gemini": {"contents": [{"role": "user", "parts": [{"text": "hi"}]},
                            {"role": "model", "parts": [{"text": "yo"}]}]},
    "Nemotron": {"input": [HI], "output": "yo"},
    "TRL, answer as messages": {"prompt": "hi", "completion": [YO]},
    "a whole conversation as the answer": {"prompt": "hi", "completion": [HI, YO]},
    "Llama": {"dialog": [HI, YO]},
    "LLaMA-Factory v1": {"messages": [
        {"role": "user", "content": part("hi")[0], "loss_weight": 0.0},
        {"role": "assistant", "content": part("yo")[0], "loss_weight": 1.0},
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_of_every_shape_are_the_same(write, name):
    (example,) = load_instructions(write(CONVERSATIONS[name]))
    assert example.text == "User: hi\nAssistant: yo" and learnt(example) == [" yo"]


@pytest.mark.parametrize("key", ["systemInstruction", "system"])
def test_a_system_prompt_of_parts_comes_first(write, key):
    value = {"parts": [{"text": "S"}]} if key == "systemInstruction" else [{"text": "S"}]
    (example,) = load_instructions(write({key: value, "messages": [HI, YO]}))
    assert example.text == "System: S\nUser: hi\nAssistant: yo"


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"]
)
def test_parts_of_a_message_are_learnt_as_axolotl_has_them(write, tokenizer, template):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    begins, ends = (["["], ["]"]) if template else ([], [])
    parts = [
        {"type": "text", "text": "Let me think..", "train": False},
        {"type": "text", "text": " It is 4."},
    ]
    (example,) = load_instructions(
        write({"messages": [HI, {"role": "assistant", "content": parts}]}), tokenizer=tokenizer
    )
    assert learnt(example)[-1] == " It is 4." + "".join(ends)
    assert "think" not in "".join(learnt(example))
    detail = [
        {"begin_offset": 0, "end_offset": 2, "train": False},
        {"begin_offset": 3, "end_offset": 7, "train": True},
    ]
    turn = {"from": "gpt", "value": "No, four, ok", "train_detail": detail}
    (example,) = load_instructions(
        write({"conversations": [{"from": "human", "value": "2+2?"}, turn]}), tokenizer=tokenizer
    )
    assert [t for t in learnt(example) if t.strip()] == [*begins, " four", *ends]
    turn["train_detail"] = [{"begin_offset": 0}]
    with pytest.raises(LoramError, match="'train_detail' needs begin_offset"):
        load_instructions(write({"conversations": [turn]}), tokenizer=tokenizer)


def test_a_message_switched_off_part_by_part_is_not_learnt(write):
    off = {"role": "assistant", "content": [{"type": "text", "text": "BAD", "weight": 0}]}
    (example,) = load_instructions(write({"messages": [HI, off, HI, YO]}))
    assert learnt(example) == [" yo"]


def test_a_problem_is_answered_by_its_solution(write):
    (example,) = load_instructions(write({"problem": "p", "solution": "s", "answer": "2"}))
    assert example.text == "Question: p\nAnswer: s"


REFUSED = [
    ({"role": "prompter", "text": "a", "message_id": "1"}, "line 1: one message of a conversation"),
    ({"question": "q", "choices": ["a", "b"], "answer": 1}, "multiple-choice question: 'choices'"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "--objective dpo, orpo and kto"),
    ({"input_ids": [1], "labels": [1]}, "token ids are not read"),
    ({"article": "a", "summary": "s"}, r"no known layout \(fields: article, summary\)\nrename"),
    ({str(i): {} for i in range(99)}, r"fields: 0, .* 11 and 87 more\)"),
    ({"prompt": ["a"], "completion": ["b"]}, "'prompt' must be text, not a list"),
]


@pytest.mark.parametrize(("record", "said"), REFUSED)
def test_what_would_be_learnt_wrongly_is_refused(write, record, said):
    with pytest.raises(LoramError, match=said):
        load_instructions(write(record))


def test_a_conversation_that_the_template_refuses_is_left_out(write, tokenizer, reporter):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    lines = [json.dumps({"messages": turns}) for turns in ([YO, HI, YO], [HI, YO])]
    source = write("\n".join(lines))
    (example,) = load_instructions(source, tokenizer=strict, reporter=reporter)
    assert example.text == "[hi][yo]"
    assert "1 left out: the chat template refuses it (the user begins)" in reporter.warnings[0]


PREFERENCES = {
    "UltraFeedback": {"prompt": "hi", "chosen": [HI, GOOD], "rejected": [HI, BAD],
                      "messages": [HI, GOOD], "score_chosen": 1.0},
    "OpenAI": {"input": {"messages": [HI], "tools": []}, "preferred_output": [GOOD],
               "non_preferred_output": [BAD]},
    "LLaMA-Factory v1": {"chosen_messages": [HI, GOOD], "rejected_messages": [HI, BAD]},
    "LLaMA-Factory": {"conversations": [{"from": "human", "value": "hi"}],
                      "chosen": {"from": "gpt", "value": "good"},
                      "rejected": {"from": "gpt", "value": "bad"}},
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_in_every_layout(write, name):
    source = write(PREFERENCES[name])
    (pair,) = load_preferences(source)
    assert pair.chosen.text == "User: hi\nAssistant: good" and learnt(pair.chosen) == [" good"]
    assert pair.rejected.text == "User: hi\nAssistant: bad"
    assert source_layout(source) == "messages"
    good, bad = load_judged(source)
    assert (good.good, good.example, bad.example) == (True, pair.chosen, pair.rejected)


def test_texts_without_a_prompt_share_it(write):
    told = "\n\nHuman: hi\n\nAssistant:"
    rows = [
        {"chosen": f"{told} good day", "rejected": f"{told} good night"},
        {"chosen": f"{told} yes", "rejected": f"{told} yes"},
    ]
    source = write("\n".join(map(json.dumps, rows)))
    (pair,) = load_preferences(source)
    assert (pair.chosen.prompt, pair.chosen.completion) == (f"{told} good", " day")
    assert (pair.rejected.prompt, pair.rejected.completion) == (f"{told} good", " night")
    with pytest.raises(LoramError, match="no prompt beside 'chosen'"):
        load_preferences(write({"chosen": "a b", "rejected": "c b"}))


def test_an_input_is_a_prompt_of_preferences_too(write):
    source = write({"system": "S", "input": "i", "chosen": "a", "rejected": "b"})
    (pair,) = load_preferences(source)
    assert pair.chosen.text == "S\n\n### Instruction:\ni\n\n### Response:\na"
    assert source_layout(source) == "instruction"


def test_judged_answers_as_whole_conversations(write):
    rows = [{"completion": [HI, GOOD], "label": True}, {"completion": [HI, BAD], "label": False}]
    found = load_judged(write("\n".join(map(json.dumps, rows))))
    assert [(a.example.text, a.good) for a in found] == [
        ("User: hi\nAssistant: good", True),
        ("User: hi\nAssistant: bad", False),
    ]


LINE = json.dumps(PAIR)
FILES = {
    "array.jsonl": json.dumps([PAIR]),
    "pretty.jsonl": json.dumps([PAIR], indent=1),
    "objects.jsonl": json.dumps(PAIR, indent=1),
    "bom.jsonl": b"\xef\xbb\xbf" + LINE.encode(),
    "crlf.jsonl": f"{LINE}\r\n\r\n",
    "held.json": json.dumps({"train": [PAIR], "test": [{"prompt": "T", "completion": "t"}]}),
    "gz.jsonl.gz": gzip.compress(LINE.encode()),
    "quoted.csv": 'prompt,completion\r\n"a","b"\r\n',
    "bom.csv": b"\xef\xbb\xbfprompt,completion\na,b\n",
    "tabs.tsv": "completion\tprompt\nb\ta\n",
}


@pytest.mark.parametrize("name", FILES)
def test_containers(write, name):
    assert [(e.prompt, e.completion) for e in load_instructions(write(FILES[name], name))] == [
        ("a", "b")
    ]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_of_a_saved_data_set(write, kind):
    import pyarrow

    table = pyarrow.Table.from_pylist([PAIR] * 300)
    sink = io.BytesIO()
    with getattr(pyarrow.ipc, f"new_{kind}")(sink, table.schema) as writer:
        writer.write_table(table)
    path = write(sink.getvalue(), "saved/data-00000-of-00001.arrow")
    for name in ("dataset_info.json", "state.json", ".cache/data.jsonl"):
        write("{}", f"saved/{name}")
    folder = path.rpartition("/")[0]
    assert len(load_instructions(folder)) == 300
    with pytest.raises(LoramError, match="not a readable arrow file"):
        load_instructions(write(sink.getvalue()[:200], "cut.arrow"))


def test_a_folder_of_more_files_than_a_data_set_has_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.setattr("loram_cli.training.data.records._MOST_FILES", 3)
    for i in range(3):
        write(LINE, f"many/{i}.jsonl")
    assert len(load_instructions(str(tmp_path / "many"))) == 3
    write(LINE, "many/3.jsonl")
    with pytest.raises(LoramError, match="many: the folder holds more than 3 files"):
        load_instructions(str(tmp_path / "many"))


@pytest.mark.parametrize("name", ["a\nb", "\0a", "\udcff", "a b", "owner/name\n"])
def test_what_no_data_set_on_the_hub_can_be_called_is_told_before_it_is_asked(name):
    with pytest.raises(LoramError, match="neither a file nor a hub data set id"):
        local_files(name)
    assert local_files("owner/name:main@train") is None


def test_a_folder_of_several_splits_is_refused(write, tmp_path):
    write(LINE, "hub/data/test-00000-of-00001.jsonl")
    folder = str(tmp_path / "hub")
    assert len(load_instructions(folder)) == 1
    write(LINE, "hub/data/train-00000-of-00001.jsonl")
    write(LINE, "hub/data/latest.jsonl")
    with pytest.raises(LoramError, match=r"several splits, such as data/test-.* beside data/lat"):
        load_instructions(folder)
