"""Chat templates by name or from a file, put on a tokenizer that has none or another one."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.sources import TEMPLATE_FILE
from loram_cli.errors import LoramError
from loram_cli.reading import home_expanded, read_text
from loram_cli.schema import unknown_name
from loram_cli.training.data.files import kind_at
from loram_cli.training.data.templates import MOST_TEMPLATE_BYTES, render

# OpenAI's ChatML, as most fine-tunes without a template of their own use it; the assistant's words
# and the end of its turn are marked as what it writes.
_CHATML = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)
_TRIAL = [{"role": "user", "content": "trial"}, {"role": "assistant", "content": "answer"}]
_FILE_ENDS = (".jinja", ".jinja2", ".j2", ".txt", ".json")


@cache
def template_names() -> tuple[str, ...]:
    """Names that :func:`named_template` knows: ChatML, and those that TRL ships."""
    return ("chatml", *sorted(path.stem for path in _trl_folder().glob("*.jinja")))


def named_template(name: str) -> str:
    """The source of a template by its name, or from a file.

    Raises:
        LoramError: The file cannot be read, or is no template.
        UsageError: There is neither such a name nor such a file.
    """
    path = home_expanded(name)
    if path.suffix.lower() in _FILE_ENDS or "/" in name or path.is_file():
        return _file_text(path)
    if name == "chatml":
        return _CHATML
    if name not in template_names():
        raise unknown_name("template", name, template_names(), "--chat-template")
    return (_trl_folder() / f"{name}.jinja").read_text("utf-8")


def with_template(tokenizer: Any, name: str | None) -> Any:
    """The tokenizer, with the template of a name or file in place of its own; None keeps its own.

    Raises:
        LoramError: As :func:`named_template`, or it does not render a question and an answer.
    """
    if name is None:
        return tokenizer
    tokenizer.chat_template = named_template(name)
    tokenizer.chat_template_source = name
    text = render(tokenizer, _TRIAL, f"a question and its answer, by --chat-template {name}")
    if _TRIAL[0]["content"] not in text:
        raise LoramError(
            f"--chat-template {name}: does not write what the user says",
            "expected a Jinja chat template as transformers takes it, a loop over 'messages'",
        )
    return tokenizer


def with_adapter_template(tokenizer: Any, directory: Path | None) -> Any:
    """The tokenizer, with the template that lies beside an adapter, where one does."""
    if directory is not None and (directory / TEMPLATE_FILE).is_file():
        return with_template(tokenizer, str(directory / TEMPLATE_FILE))
    return tokenizer


def _trl_folder() -> Path:
    # Found, not imported: TRL takes seconds.
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places or ["trl"]))) / "chat_templates"


def _file_text(path: Path) -> str:
    if path.suffix.lower() == ".json":
        return _of_config(path)
    if kind_at(path) is None:
        raise LoramError(
            f"--chat-template {path}: no such file",
            f"pass a Jinja file, or a name: {', '.join(template_names()[:8])}, ...",
        )
    return read_text(path, most_bytes=MOST_TEMPLATE_BYTES).removeprefix("\ufeff")


def _of_config(path: Path) -> str:
    """The template in a ``tokenizer_config.json``."""
    from loram_cli.checkpoint.json_files import read_json

    template = read_json(path).get("chat_template")
    if not isinstance(template, str):
        raise LoramError(
            f"{path}: holds no text 'chat_template'", "pass a Jinja file, or another config"
        )
    return template
