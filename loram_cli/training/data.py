"""Training data as text: documents for alignment, prompt and completion for fine-tuning."""

import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.training.records import (
    DEMO_PREFIX,
    Record,
    is_text_file,
    local_files,
    read_records,
    read_text_file,
)

T = TypeVar("T")

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
_LAYOUTS = (
    "prompt/completion, instruction(+input)/output, question/answer, messages or conversations"
)
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
# Two or more blank lines part documents; one blank line parts paragraphs of the same document.
_DOCUMENT_BREAK = re.compile(r"\n[^\S\n]*\n[^\S\n]*\n\s*|<\|endoftext\|>")
_MAX_DOCUMENT_CHARS = 20_000


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


def load_text(
    source: str, *, limit: int | None = None, reporter: Reporter | None = None
) -> list[str]:
    """Documents to continue pre-training, or to calibrate, on.

    Plain text is cut into documents where two or more lines are blank (and at ``<|endoftext|>``),
    and every 20,000 characters at a line's end. Records give their ``text`` field; records in an
    instruction layout give prompt and completion as one text.

    Args:
        source: A .txt, .jsonl(.gz), .json or .parquet file, a folder of those, ``demo:corpus``,
            ``demo:calibration``, or a hub data set id ``owner/name[:config][@split]``.
        limit: Take at most so many documents.
        reporter: Told of documents left out because they are empty.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    texts: list[str] = []
    empty = 0
    for text in _documents(source, limit):
        if not text.strip():
            empty += 1
            continue
        texts.append(text)
        if limit is not None and len(texts) >= limit:
            break
    if empty:
        (reporter or NullReporter()).warn(f"{source}: {empty} empty documents left out")
    if not texts:
        raise LoramError(f"{source}: no text in it")
    return texts


def load_instructions(
    source: str,
    *,
    tokenizer: Any | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> list[Example]:
    """Examples to fine-tune on; each record's layout is told by its fields.

    ``question``/``answer`` is rendered exactly as lm-eval's gsm8k does, ``instruction``/``output``
    by Alpaca's template, ``messages`` by the tokenizer's chat template: one example for each of
    the assistant's turns.

    Args:
        source: A .jsonl(.gz), .json or .parquet file, a folder of those, ``demo:train``,
            ``demo:validation``, ``demo:test``, or a hub id ``owner/name[:config][@split]``.
        tokenizer: Whose chat template renders messages.
        limit: Read at most so many records.
        reporter: Told of what is left out or rendered without a chat template.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    reporter = reporter or NullReporter()
    chat = _Chat(tokenizer)
    examples: list[Example] = []
    empty = 0
    for record in read_records(source, limit=limit):
        for example in _examples(record, chat):
            if example.completion.strip():
                examples.append(example)
            else:
                empty += 1
    if empty:
        reporter.warn(f"{source}: {empty} examples with an empty answer left out")
    if chat.used_fallback:
        reporter.warn(
            "the tokenizer has no chat template: messages are rendered as 'User: .. Assistant: ..'"
        )
    if not examples:
        raise LoramError(f"{source}: no examples in it", f"layouts: {_LAYOUTS}")
    return examples


def split_eval(items: Sequence[T], fraction_or_count: float, seed: int) -> tuple[list[T], list[T]]:
    """Set a random part aside for evaluation; both parts keep their order.

    Args:
        items: What to split.
        fraction_or_count: Below 1 a share, from 1 on a count; 0 sets nothing aside.
        seed: Decides which.

    Returns:
        Training part and evaluation part.

    Raises:
        UsageError: Negative, not whole, or nothing would be left to train on.
    """
    wanted = fraction_or_count
    if wanted < 0 or (wanted >= 1 and wanted != int(wanted)):
        raise UsageError(f"evaluation split {wanted:g}: a share below 1 or a whole count is wanted")
    count = int(wanted) if wanted >= 1 else round(wanted * len(items))
    if 0 < wanted < 1:
        count = max(1, count)
    if count >= len(items) > 0 and count:
        raise UsageError(
            f"evaluation split {wanted:g} takes all {len(items)} examples",
            "set less aside, or pass more data",
        )
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    return (
        [item for i, item in enumerate(items) if i not in chosen],
        [item for i, item in enumerate(items) if i in chosen],
    )


def _documents(source: str, limit: int | None) -> Iterator[str]:
    is_demo = source.startswith(DEMO_PREFIX)
    files = None if is_demo else local_files(source)
    if files is None:
        yield from (_text_of(record) for record in read_records(source, limit=limit))
        return
    for file in files:
        if is_text_file(file):
            yield from _split_documents(read_text_file(file))
        else:
            yield from (_text_of(record) for record in read_records(os.fspath(file)))


def _split_documents(text: str) -> Iterator[str]:
    for document in _DOCUMENT_BREAK.split(text.replace("\r\n", "\n")):
        rest = document
        while len(rest) > _MAX_DOCUMENT_CHARS:
            cut = rest.rfind("\n", 0, _MAX_DOCUMENT_CHARS) + 1 or _MAX_DOCUMENT_CHARS
            yield rest[:cut]
            rest = rest[cut:]
        if rest.strip():
            yield rest


def _text_of(record: Record) -> str:
    if "text" in record.fields:
        return _string(record, "text")
    try:
        examples = _examples(record, _Chat(None))
    except LoramError:
        raise LoramError(
            f"{record.where}: no field 'text' (fields: {', '.join(record.fields) or 'none'})"
        ) from None
    # Turns share their beginnings; the last prompt holds all of them.
    return examples[-1].prompt + examples[-1].completion


def _examples(record: Record, chat: "_Chat") -> list[Example]:
    fields = record.fields
    if "messages" in fields or "conversations" in fields:
        key = "messages" if "messages" in fields else "conversations"
        return chat.render(_messages(record, key, fields[key]), record.where)
    if "prompt" in fields and "completion" in fields:
        if isinstance(fields["prompt"], list):
            turns = [*fields["prompt"], *_as_list(fields["completion"])]
            return chat.render(_messages(record, "prompt", turns), record.where)[-1:]
        return [Example(_string(record, "prompt"), _string(record, "completion"))]
    if "instruction" in fields and ("output" in fields or "response" in fields):
        instruction = _string(record, "instruction")
        context = _string(record, "input") if fields.get("input") is not None else ""
        template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA
        answer = _string(record, "output" if "output" in fields else "response")
        return [
            Example(template.format_map({"instruction": instruction, "input": context}), answer)
        ]
    if "question" in fields and "answer" in fields:
        question, answer = _string(record, "question"), _string(record, "answer")
        return [Example(f"Question: {question}\nAnswer:", f" {answer}")]
    raise LoramError(
        f"{record.where}: no known layout (fields: {', '.join(map(str, fields)) or 'none'})",
        f"layouts: {_LAYOUTS}",
    )


def _string(record: Record, key: str) -> str:
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


class _Chat:
    """Renders conversations, by the tokenizer's template where it has one."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._has_template = getattr(tokenizer, "chat_template", None) is not None
        self.used_fallback = False

    def render(self, messages: list[dict[str, str]], where: str) -> list[Example]:
        """One example for each turn of the assistant."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self._has_template:
            return [self._by_template(messages[: i + 1], where) for i in turns]
        self.used_fallback = True
        return [_plain_turn(messages[: i + 1]) for i in turns]

    def _by_template(self, messages: list[dict[str, str]], where: str) -> Example:
        import jinja2

        apply = self._tokenizer.apply_chat_template
        try:
            prompt = apply(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = apply(messages, tokenize=False)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise LoramError(f"{where}: the chat template refuses it ({error})") from error
        # Some templates write a turn that is asked for differently from one that is there.
        shared = 0
        while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
            shared += 1
        return Example(whole[:shared], whole[shared:], special_tokens=False)


def _plain_turn(messages: list[dict[str, str]]) -> Example:
    lines = [f"{_ROLE_NAMES.get(m['role'], m['role'])}: {m['content']}\n" for m in messages[:-1]]
    return Example("".join(lines) + "Assistant:", f" {messages[-1]['content']}")
