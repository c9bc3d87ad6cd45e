import copy
import json
import resource
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter
from loram_cli.training.data import templates
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.examples import Example, single_turns
from loram_cli.training.data.layouts import asked
from loram_cli.training.data.tokens import TokenRow, encode_prompt, tokenize_examples

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn></s>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Earlier thoughts go, as Qwen3's do, and the last turn gets an empty one.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


@pytest.fixture
def chatty(tokenizer):
    def chatty(template):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return own

    return chatty


@pytest.fixture
def load(tmp_path, reporter):
    def load(tokenizer, *records, **settings):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_instructions(str(path), tokenizer=tokenizer, reporter=reporter, **settings)

    return load


def learnt(example):
    return [example.text[begin:end] for begin, end in example.spans]


@pytest.mark.parametrize(
    ("template", "spans"),
    [
        (CHATML, ["Hello</s>\n", "Ciao</s>\n"]),
        (LLAMA2, [" Hello </s>", " Ciao </s>"]),
        (GEMMA, ["Hello<end_of_turn></s>\n", "Ciao<end_of_turn></s>\n"]),
        (THINKING, ["Hello</s>\n", "<think>\n\n</think>\n\nCiao</s>\n"]),
        (MARKED, ["Hello</s>", "Ciao</s>"]),
        (None, [" Hello</s>", " Ciao"]),
    ],
)
def test_a_conversation_is_one_row_that_learns_every_turn(chatty, load, template, spans):
    tokenizer = chatty(template)
    (example,) = load(tokenizer, {"messages": TALK})
    assert learnt(example) == spans
    if template is not None:
        assert example.text == tokenizer.apply_chat_template(TALK, tokenize=False)
    (last,) = load(tokenizer, {"messages": TALK}, train_on="last")
    assert (last.text, learnt(last)) == (example.text, spans[1:])
    (row,) = tokenize_examples([example], tokenizer, 512, NullReporter())
    runs = "".join(
        tokenizer.decode(t) if label != -100 else "|"
        for t, label in zip(row.input_ids, row.labels(), strict=True)
    )
    ended = [*spans[:-1], spans[-1] + ("" if "</s>" in spans[-1] else "</s>")]
    assert [run for run in runs.split("|") if run] == ended


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GEMMA, None])
def test_one_row_learns_as_many_tokens_as_a_row_for_each_turn(chatty, load, template):
    """The old form: each turn a row of its own, behind all that stands before it."""
    tokenizer = chatty(template)
    (example,) = load(tokenizer, {"messages": TALK})
    turns = [load(tokenizer, {"messages": TALK[:n]}, train_on="last")[0] for n in (2, 4)]
    rows = tokenize_examples(turns, tokenizer, 512, NullReporter())
    (row,) = tokenize_examples([example], tokenizer, 512, NullReporter())
    assert row.learnt_tokens() == sum(old.learnt_tokens() for old in rows)
    assert row.input_ids.tolist() == rows[1].input_ids.tolist()
    apart = tokenize_examples(single_turns(example), tokenizer, 512, NullReporter())
    assert [r.learnt_tokens() for r in apart] == [r.learnt_tokens() for r in rows]


def test_loss_on_all_learns_every_token_of_a_conversation_once(chatty, load):
    tokenizer = chatty(CHATML)
    examples = load(tokenizer, {"messages": TALK * 2})
    (row,) = tokenize_examples(examples, tokenizer, 512, NullReporter(), loss_on_prompt=True)
    assert row.learnt_tokens() == len(row.input_ids) - 1
    assert tokenizer.decode(row.input_ids) == examples[0].text


def test_a_row_that_is_cut_keeps_its_first_turns(chatty, load):
    tokenizer = chatty(CHATML)
    (example,) = load(tokenizer, {"messages": TALK})
    (row,) = tokenize_examples([example], tokenizer, 60, NullReporter())
    whole = tokenize_examples([example], tokenizer, 512, NullReporter())[0]
    assert len(row.input_ids) == 60
    assert row.labels().tolist() == whole.labels()[:60].tolist()
    assert row.learnt_tokens() > 0


def test_a_template_that_refuses_or_ignores_a_system_message_gets_it_folded(chatty, load, reporter):
    silent = GEMMA.replace("raise_exception('System role not supported')", "''").replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    system = {"role": "system", "content": "Be brief."}
    for template in (GEMMA, silent):
        tokenizer = chatty(template)
        records = [{"messages": [system, *TALK]}] * 2
        folded = [{"role": "user", "content": "Be brief.\n\nHi"}, *TALK[1:]]
        for example in load(tokenizer, *records):
            assert example.text == tokenizer.apply_chat_template(folded, tokenize=False)
            assert learnt(example) == ["Hello<end_of_turn></s>\n", "Ciao<end_of_turn></s>\n"]
        assert "put before the first user message (2 times" in reporter.warnings.pop()
    assert not reporter.warnings


def test_tools_and_tool_calls_reach_the_template(chatty, load, reporter):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
        "{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    schema = {"name": "add", "parameters": {"type": "object"}}
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    openai = {
        "tools": [{"type": "function", "function": schema}],
        "messages": [
            {"role": "user", "content": "1+?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two"},
        ],
    }
    sharegpt = {
        "tools": json.dumps([schema]),
        "conversations": [
            {"from": "human", "value": "1+?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two"},
        ],
    }
    first, second = load(chatty(template), openai, sharegpt)
    assert first == second
    assert first.text.startswith('[{"type": "function", "function": {"name": "add"')
    assert learnt(first) == ['<call>add{"a": 1}</s>', "Two</s>"]
    assert not reporter.warnings
    load(chatty(CHATML), {**openai, "messages": openai["messages"][:1] + openai["messages"][3:]})
    assert reporter.warnings[0].endswith("how many records: 'tools' (1)")


def test_bos_of_a_template_is_not_doubled(chatty, load):
    tokenizer = chatty(GEMMA)
    (example,) = load(tokenizer, {"messages": TALK[:2]})
    (row,) = tokenize_examples([example], tokenizer, 512, NullReporter())
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    for how in (True, False):
        prompt = asked("Hi", "messages", Chat(tokenizer), learnt=how)
        ids = encode_prompt(prompt.prompt, tokenizer, special_tokens=prompt.special_tokens)
        assert ids == row.input_ids[: row.answer_start].tolist()
    # What a template has rendered, given as a prompt of text.
    assert encode_prompt(example.prompt, tokenizer) == row.input_ids[: row.answer_start].tolist()


HOSTILE = {
    "{{ 1 // 0 }}": "fails on it .*zero",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "more than",
    "{{ 'a' * 10**10 }}": r"raises numbers to a power \(\*\*\)",
    "{{ 'a' * 10000000000 }}": "takes more than 512 MiB",
    "{{ 'a' * 30000000 }}": "makes 30000000 characters of",
    "{{ ('%' ~ 9999999999 ~ 'd') % 1 }}": "takes more than 512 MiB|fails on it|refuses it",
    "{{ 'a' | center(10000000000) }}": "takes more than 512 MiB",
    "{{ messages.nothing.at_all }}": "refuses it",
}
BROKEN = {
    "{% for m in messages %}": r"line 1: the chat template does not parse \(Unexpected end",
    "\n{{ messages|nope }}": r"line 2: the chat template does not parse \(No filter",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_ends_in_one_error_that_names_its_file(
    chatty, load, tmp_path, monkeypatch, template
):
    if "range" in template:  # the others end by what they do, however slow the machine
        monkeypatch.setattr(templates, "MOST_SECONDS", 0.3)
    chatty(template).save_pretrained(tmp_path / "model")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(LoramError, match=f"line 1: the chat template .*{HOSTILE[template]}") as e:
        load(tokenizer, {"messages": TALK})
    assert e.value.hint == str(tmp_path / "model" / "chat_template.jinja")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert before == (
        signal.getsignal(signal.SIGVTALRM),
        resource.getrlimit(resource.RLIMIT_AS),
    )


@pytest.mark.parametrize("template", [*BROKEN, 3, {"tool_use": "{{ messages }}"}])
def test_a_template_that_is_none_is_blamed_and_no_record(chatty, load, template):
    message = BROKEN.get(template) if isinstance(template, str) else "expected text|the default one"
    with pytest.raises(LoramError, match=message) as caught:
        load(chatty(template), {"messages": TALK})
    assert "a.jsonl" not in str(caught.value)


def test_in_a_thread_a_template_is_ended_too_and_limits_no_other(chatty, load, monkeypatch):
    """As a server renders: beside threads that go on."""
    monkeypatch.setattr(templates, "MOST_SECONDS", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(LoramError, match=r"the chat template takes more than 0\.2 s"):
            thread.submit(load, chatty(loops), {"messages": TALK}).result()
        monkeypatch.setattr(templates, "MOST_SECONDS", 9)
        plain = chatty("{% for m in messages %}{{ m.content }}{% endfor %}")
        assert thread.submit(load, plain, {"messages": TALK}).result()
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_given_ranges_and_spans_are_two_views_of_the_same(tokenizer):
    example = Example("ab", "cdefgh", given=((1, 3), (5, 6)))
    assert [example.text[begin:end] for begin, end in example.spans] == ["c", "fg"]
    (row,) = tokenize_examples([example], tokenizer, 64, NullReporter())
    assert isinstance(row, TokenRow)
    assert tokenizer.decode([i for i in row.labels() if i >= 0]) == "cfg</s>"
