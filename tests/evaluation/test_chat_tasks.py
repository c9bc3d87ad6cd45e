"""Tasks asked as messages: examples as turns, choices as the assistant's words."""

import copy

import pytest

from loram_cli.evaluation.engine import Engine
from loram_cli.evaluation.harness import evaluate_model
from loram_cli.evaluation.requests import resolve_tasks
from loram_cli.training.data.template_names import with_template


class Recorder:
    """A backend that keeps what it is asked, and answers the same to everything."""

    def __init__(self):
        self.prompts, self.pairs = [], []

    def generate(self, jobs):
        self.prompts += [job.prompt for job in jobs]
        yield [(i, "#### 1") for i in range(len(jobs))]

    def loglikelihood(self, pairs):
        self.pairs += pairs
        yield [(i, [-1.0, False]) for i in range(len(pairs))]


@pytest.fixture
def chat_tokenizer(tokenizer):
    return with_template(copy.deepcopy(tokenizer), "chatml")


GSM8K = [{"question": f"{i} plus 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(4)]
OPTIONS = {"text": ["a red one", "a blue one"], "label": ["A", "B"]}
ARC = [
    {"id": str(i), "question": f"Which {i}?", "choices": OPTIONS, "answerKey": "AB"[i % 2]}
    for i in range(4)
]


def asked(task, tokenizer, write_jsonl, *, chat, shots):
    data = {task: write_jsonl("test.jsonl", {"gsm8k": GSM8K, "arc_easy": ARC}[task])}
    requests = resolve_tasks([task], data, prefer_bundled=True, num_fewshot=shots, limit=1)
    backend = Recorder()
    engine = Engine(lambda: backend, tokenizer, 4096, chat=chat)
    assert evaluate_model(engine, requests)
    return backend


def test_a_generated_answer_is_asked_for_in_turns(chat_tokenizer, write_jsonl):
    (prompt,) = asked("gsm8k", chat_tokenizer, write_jsonl, chat=True, shots=2).prompts
    # Two solved examples are two turns each, and the assistant's turn is open.
    assert prompt.count("<|im_start|>user\n") == 3
    assert prompt.count("<|im_start|>assistant\n") == 3
    assert prompt.endswith("0 plus 1?\nA:<|im_end|>\n<|im_start|>assistant\n")
    (plain,) = asked("gsm8k", chat_tokenizer, write_jsonl, chat=False, shots=2).prompts
    assert "<|im_start|>" not in plain


def test_a_choice_is_what_the_assistant_would_say(chat_tokenizer, write_jsonl):
    pairs = asked("arc_easy", chat_tokenizer, write_jsonl, chat=True, shots=1).pairs
    assert [choice for _, choice in pairs] == ["a red one", "a blue one"]
    for prompt, _ in pairs:
        assert prompt.count("<|im_start|>user\n") == 2
        assert prompt.endswith("<|im_start|>assistant\n")


def test_a_system_message_that_is_refused_goes_before_the_question(chat_tokenizer):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}.{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat_tokenizer.chat_template = template
    engine = Engine(lambda: Recorder(), chat_tokenizer, 64, chat=True)
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "why"}]
    assert engine.apply_chat_template(turns) == "[user]Be brief\n\nwhy.[assistant]"
    begun = [*turns, {"role": "assistant", "content": "Since"}]
    text = engine.apply_chat_template(begun, add_generation_prompt=False)
    assert text == "[user]Be brief\n\nwhy.[assistant]Since"
