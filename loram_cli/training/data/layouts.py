"""Layouts of instruction records: what each one teaches, as prompt and completion."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.training.data.records import Record

# The template of Stanford Alpaca, with and without an input, to the letter.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
LAYOUTS = (
    "prompt/completion, instruction(+input)/output, question/answer, messages or conversations"
)
Layout = Literal["messages", "prompt", "instruction", "question"]
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


@dataclass(frozen=True)
class Example:
    """One thing to learn: given ``prompt``, write ``completion``.

    Attributes:
        prompt: Text that is given.
        completion: Text that is learnt; the end-of-sequence token follows it.
        special_tokens: Whether the tokenizer adds its own (bos); not after a chat template,
            which has written them already.
    """

    prompt: str
    completion: str
    special_tokens: bool = True


def examples_of(record: Record, chat: "Chat") -> list[Example]:
    """What a record teaches, its layout told by its fields.

    Raises:
        LoramError: No known layout; names file and line.
    """
    fields = record.fields
    layout = layout_of(fields)
    if layout == "messages":
        if "prompt" in fields and not {"messages", "conversations"} & set(fields):
            turns = [*fields["prompt"], *_as_list(fields["completion"])]
            return chat.render(_messages(record, "prompt", turns), record.where)[-1:]
        key = "messages" if "messages" in fields else "conversations"
        return chat.render(_messages(record, key, fields[key]), record.where)
    if layout == "prompt":
        return [Example(text_field(record, "prompt"), text_field(record, "completion"))]
    if layout == "instruction":
        instruction = text_field(record, "instruction")
        context = text_field(record, "input") if fields.get("input") is not None else ""
        template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA
        answer = text_field(record, "output" if "output" in fields else "response")
        return [
            Example(template.format_map({"instruction": instruction, "input": context}), answer)
        ]
    if layout == "question":
        question, answer = text_field(record, "question"), text_field(record, "answer")
        return [Example(f"Question: {question}\nAnswer:", f" {answer}")]
    raise LoramError(
        f"{record.where}: no known layout (fields: {', '.join(map(str, fields)) or 'none'})",
        f"layouts: {LAYOUTS}",
    )


def layout_of(fields: Mapping[str, Any]) -> Layout | None:
    """Which layout a record's fields are of; None where it is none."""
    if "messages" in fields or "conversations" in fields:
        return "messages"
    if "prompt" in fields and "completion" in fields:
        return "messages" if isinstance(fields["prompt"], list) else "prompt"
    if "instruction" in fields and ("output" in fields or "response" in fields):
        return "instruction"
    if "question" in fields and "answer" in fields:
        return "question"
    return None


def asked(text: str, layout: Layout, chat: "Chat", *, learnt: bool = True) -> Example:
    """A user's text as the prompt of an example of a layout, its completion yet to be written.

    Args:
        text: The question, instruction, message, or prompt as it is.
        layout: As of the data that was trained on.
        chat: Renders messages.
        learnt: Whether the model learnt from examples as they are made here; else a chat template
            opens the answer's turn as it does for the model that it belongs to.
    """
    if layout == "messages" and not learnt and chat.has_template:
        return chat.opened(text)
    fields: dict[Layout, dict[str, Any]] = {
        "messages": {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "."},
            ]
        },
        "prompt": {"prompt": text, "completion": "."},
        "instruction": {"instruction": text, "output": "."},
        "question": {"question": text, "answer": "."},
    }
    [example] = examples_of(Record(fields[layout], "the prompt"), chat)
    return replace(example, completion="")


def text_field(record: Record, key: str) -> str:
    """A field that must be text.

    Raises:
        LoramError: It is something else; names file and line.
    """
    value = record.fields[key]
    if not isinstance(value, str):
        raise LoramError(f"{record.where}: field '{key}' must be text, not {value!r:.60}")
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _messages(record: Record, key: str, turns: Any) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise LoramError(f"{record.where}: field '{key}' must be a list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        turn = turn if isinstance(turn, Mapping) else {}
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise LoramError(
                f"{record.where}: message {number} of '{key}' needs 'role' and 'content' as text"
            )
        messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise LoramError(f"{record.where}: '{key}' has no message of the assistant to learn from")
    return messages


class Chat:
    """Renders conversations, by the tokenizer's template where it has one."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        self._used_fallback = False

    def render(self, messages: list[dict[str, str]], where: str) -> list[Example]:
        """One example for each turn of the assistant."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.has_template:
            return [self._by_template(messages[: i + 1], where) for i in turns]
        self._used_fallback = True
        return [_plain_turn(messages[: i + 1]) for i in turns]

    def opened(self, text: str) -> Example:
        """A message of the user, and the turn of the assistant begun by the template."""
        message = {"role": "user", "content": text}
        return Example(self._applied([message], "the prompt", begun=True), "", special_tokens=False)

    def warn_of_fallback(self, reporter: Reporter) -> None:
        """Tell of conversations that were rendered without a template."""
        if self._used_fallback:
            reporter.warn(
                "the tokenizer has no chat template: "
                "messages are rendered as 'User: .. Assistant: ..'"
            )

    def _by_template(self, messages: list[dict[str, str]], where: str) -> Example:
        prompt = self._applied(messages[:-1], where, begun=True)
        whole = self._applied(messages, where, begun=False)
        # Some templates write a turn that is asked for differently from one that is there.
        shared = 0
        while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
            shared += 1
        return Example(whole[:shared], whole[shared:], special_tokens=False)

    def _applied(self, messages: list[dict[str, str]], where: str, *, begun: bool) -> str:
        import jinja2

        apply = self._tokenizer.apply_chat_template
        try:
            return apply(messages, tokenize=False, add_generation_prompt=begun)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise LoramError(f"{where}: the chat template refuses it ({error})") from error


def _plain_turn(messages: list[dict[str, str]]) -> Example:
    lines = [f"{_ROLE_NAMES.get(m['role'], m['role'])}: {m['content']}\n" for m in messages[:-1]]
    return Example("".join(lines) + "Assistant:", f" {messages[-1]['content']}")
