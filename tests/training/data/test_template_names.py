"""Chat templates by name and from files, put on a tokenizer."""

import copy
import json
import os

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.template_names import (
    named_template,
    template_names,
    with_adapter_template,
    with_template,
)

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def bare(tokenizer):
    return copy.deepcopy(tokenizer)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    return str(path)


def test_a_name_a_file_and_a_tokenizer_config_give_a_template(bare, data, tmp_path, reporter):
    file = tmp_path / "mine.jinja"
    file.write_text(PLAIN)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": PLAIN}))
    for name in (str(file), str(tmp_path / "tokenizer_config.json")):
        (example,) = load_instructions(data, tokenizer=with_template(bare, name), reporter=reporter)
        assert (example.prompt, example.completion) == ("<user>hi</><assistant>", "yes</>")
    (example,) = load_instructions(data, tokenizer=with_template(bare, "chatml"), reporter=reporter)
    assert example.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert [example.text[a:b] for a, b in example.spans] == ["yes<|im_end|>"]
    assert not reporter.warnings
    assert with_template(bare, None) is bare


def test_the_names_are_those_of_trl_and_render(bare):
    assert {"chatml", "llama3", "qwen3"} <= set(template_names())
    assert "yes" in Chat(with_template(bare, "llama3")).asked(TURNS)


def test_an_adapters_own_template_is_taken_over(bare, tmp_path):
    assert with_adapter_template(bare, tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert with_adapter_template(bare, tmp_path).chat_template == PLAIN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for m in messages %}", "line 1: the chat template does not parse"),
        ("{{ messages | length }}", "does not write what the user says"),
        ("{{ 9 ** 9 }}", "raises numbers to a power"),
    ],
)
def test_a_file_that_is_no_template_is_refused(bare, tmp_path, text, said):
    (tmp_path / "bad.jinja").write_text(text)
    with pytest.raises(LoramError, match=said):
        with_template(bare, str(tmp_path / "bad.jinja"))


def test_a_name_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown template 'lama3'\ndid you mean 'llama3'"):
        named_template("lama3")
    with pytest.raises(LoramError, match="no such file"):
        named_template(str(tmp_path / "absent.jinja"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(LoramError, match="holds no text 'chat_template'"):
        named_template(str(tmp_path / "a.json"))


def test_a_file_without_an_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jinja")
    with pytest.raises(LoramError, match="is not a regular file"):
        named_template(str(tmp_path / "a.jinja"))
