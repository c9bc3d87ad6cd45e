"""Layouts of instruction records: what each one teaches, as prompt and completion."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from loram_cli.errors import LoramError
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.conversations import (
    SYSTEM_KEYS,
    Message,
    TrainOn,
    are_turns,
    conversation_key,
    further_conversation_key,
    read_conversation,
)
from loram_cli.training.data.examples import Example, example_of_spans
from loram_cli.training.data.fields import Fields, as_text, is_absent, names_of, present
from loram_cli.training.data.json_text import decoded, decoded_turns
from loram_cli.training.data.records import Record
from loram_cli.training.data.tally import Tally, UnusableRecord

# The template of Stanford Alpaca, with and without an input, to the letter. A record's own system
# prompt takes the place of the sentences before it, as in axolotl.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
LAYOUTS = (
    "prompt/completion, instruction(+input)/output, question/answer, messages or conversations, "
    "segments, text"
)
Layout = Literal["messages", "prompt", "instruction", "question", "text"]
_INSTRUCTION = ("instruction", "query", "input", "inputs", "source")
_CONTEXT = ("input", "context")
_QUESTIONS = ("question", "problem")
# Prompts that may be lists of messages, as may their answers.
_PROMPTS: tuple[tuple[str, Layout], ...] = (("prompt", "prompt"), ("input", "instruction"))
# Of multiple choice, where an answer that is a letter or a number says nothing by itself.
_CHOICES = ("choices", "options")
# What a question is about.
_PASSAGES = ("context", "passage", "article")
_ANSWERS: dict[Layout, tuple[str, ...]] = {
    "prompt": ("completion", "response", "output", "answer", "generation"),
    "instruction": ("output", "response", "completion", "answer", "targets", "target"),
    "question": ("answer", "response", "output", "completion", "solution"),
}
# MATH's and NuminaMath's: the answer beside a solution is its last line.
_SOLUTIONS = ("solution", *_ANSWERS["question"][:-1])


def examples_of(record: Record, chat: Chat, *, train_on: TrainOn = "all") -> list[Example]:
    """What a record teaches, its layout told by its fields; nearly always one example.

    The chat's tally counts what was changed and what was not used.

    Raises:
        UnusableRecord: There is nothing to learn in it, because of a null for instance.
        LoramError: No known layout, or a message that is not text; names file and line.
    """
    fields = Fields(record, chat.tally)
    layout = layout_of(record.fields)
    if layout is None:
        raise _unknown(record)
    if layout == "messages":
        examples = _conversation(fields, chat, train_on)
    elif layout == "instruction":
        examples = [_instruction(fields, chat, train_on)]
    elif layout == "text" and "segments" in fields:
        examples = [_segments(fields)]
    elif layout == "text":
        examples = [Example("", fields.text("text"))]
    else:
        asked = fields.first_of(("prompt",) if layout == "prompt" else _QUESTIONS)
        assert asked is not None, "the layout is known by it"
        prompt = fields.text(asked)
        answer = fields.text(_answer_of(fields, layout))
        if layout == "question":
            _refuse_choices(fields)
            context = fields.text_if_any(*_PASSAGES)
            passage = f"{context}\n\n" if context.strip() else ""
            prompt, answer = f"{passage}Question: {prompt}\nAnswer:", f" {answer}"
        system = fields.text_if_any(*SYSTEM_KEYS)
        examples = [Example(f"{system}\n\n{prompt}" if system.strip() else prompt, answer)]
    if not any(example.completion.strip() for example in examples):
        raise UnusableRecord(record.where, "the answer is empty")
    fields.tell_unused()
    return examples


def layout_of(fields: Mapping[str, Any]) -> Layout | None:
    """Which layout a record's fields are of, nulls not counted; None where it is none."""
    return _layout(present(fields))


def asked(text: str, layout: Layout, chat: Chat, *, learnt: bool = True) -> Example:
    """A user's text as the prompt of an example of a layout, its completion yet to be written.

    Args:
        text: The question, instruction, message, or prompt as it is.
        layout: As of the data that was trained on.
        chat: Renders messages.
        learnt: Whether the model learnt from examples as they are made here; else a chat template
            opens the answer's turn as it does for the model that it belongs to.
    """
    if layout == "messages" and not learnt and chat.has_template:
        return chat.opened([{"role": "user", "content": text}])
    if layout == "text":
        return Example(text, "")
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
    return replace(example, completion="", given=())


def continued(turns: Sequence[Message], layout: Layout, chat: Chat, *, learnt: bool) -> Example:
    """A conversation that ends with the user's turn, as the prompt of its answer.

    Args:
        turns: Messages with ``role`` (system, user or assistant) and ``content``.
        layout: As of the data that was trained on. Those without turns get the earlier ones as
            examples of the same layout before the last.
        chat: Renders messages.
        learnt: As of :func:`asked`.

    Raises:
        LoramError: There is no user's turn at the end, or the template refuses the conversation.
    """
    if not turns or turns[-1]["role"] != "user":
        raise LoramError("the last message is not the user's", "end with a message of role 'user'")
    if layout == "messages" and not learnt and chat.has_template:
        return chat.opened(turns)
    if layout == "messages":
        answer = {"role": "assistant", "content": "."}
        record = Record({"messages": [*turns, answer]}, "the prompt")
        examples = examples_of(record, chat, train_on="last")
        return replace(examples[-1], completion="", given=())
    *earlier, last = turns
    text = ""
    for turn in earlier:
        if turn["role"] == "user":
            text += asked(turn["content"], layout, chat).prompt
        else:
            between = " " if turn["role"] == "assistant" and text[-1:].strip() else ""
            text += f"{between}{turn['content']}\n\n"
    example = asked(last["content"], layout, chat)
    return replace(example, prompt=text + example.prompt)


def text_field(record: Record, key: str, tally: Tally) -> str:
    """A field's text; a number is turned to text and counted.

    Raises:
        UnusableRecord: It is something else.
    """
    return Fields(record, tally).text(key)


def _layout(fields: Mapping[str, Any]) -> Layout | None:
    if conversation_key(fields) is not None or _prompt_turns(fields) is not None:
        return "messages"
    if "prompt" in fields and any(key in fields for key in _ANSWERS["prompt"]):
        return "prompt"
    if "question" in fields and "instruction" not in fields:
        if any(key in fields for key in _ANSWERS["question"]):
            return "question"
    elif any(_instructs(fields, key) for key in _INSTRUCTION):
        return "instruction"
    elif "problem" in fields and any(key in fields for key in _SOLUTIONS):
        return "question"
    if ("text" in fields and "role" not in fields) or _has_segments(fields):
        return "text"
    return "messages" if further_conversation_key(fields) is not None else None


def _prompt_turns(fields: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """The fields of a prompt and an answer of which one is messages; None where none is.

    The prompt's is None where the answer is the whole conversation.
    """
    for key, layout in _PROMPTS:
        answer = next((name for name in _ANSWERS[layout] if name in fields), None)
        if answer is None or (key == "input" and "instruction" in fields):
            continue
        turns = decoded_turns(fields[answer])
        if are_turns(turns) and opens(turns):
            return answer, None
        if key in fields and (are_turns(decoded_turns(fields[key])) or are_turns(turns)):
            return answer, key
    return None


def opens(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether messages are a conversation from its beginning, and not an answer."""
    return str(turns[0].get("role", turns[0].get("from"))).lower() in ("system", "user", "human")


def _has_segments(fields: Mapping[str, Any]) -> bool:
    segments = decoded(fields.get("segments"))
    return isinstance(segments, list) and all(
        isinstance(part, Mapping) and {"label", "text"} <= set(part) for part in segments
    )


def _segments(fields: Fields) -> Example:
    """Axolotl's layout without a template: texts, each learnt or given.

    Raises:
        UnusableRecord: None of them is learnt, or one is no text.
    """
    text = ""
    spans: list[tuple[int, int]] = []
    for part in decoded(fields.value("segments")):
        begin = len(text)
        text += as_text(part["text"], "a segment's text", fields.where, fields.tally)
        if part["label"] and len(text) > begin:
            spans.append((begin, len(text)))
    if not spans:
        raise UnusableRecord(fields.where, "no segment of it is learnt")
    return example_of_spans(text, tuple(spans), special_tokens=True)


def _instructs(fields: Mapping[str, Any], key: str) -> bool:
    return key in fields and any(answer in fields for answer in _ANSWERS["instruction"])


def _unknown(record: Record) -> LoramError:
    """Why a record has no layout: a null where its field should be, or other fields."""
    fields = present(record.fields)
    nulls = [str(key) for key, value in record.fields.items() if is_absent(value)]
    if nulls and _layout(record.fields) is not None:
        return UnusableRecord(record.where, f"'{nulls[0]}' is null")
    hint = f"rename the fields to one of: {LAYOUTS}"
    if "role" in fields and {"text", "content"} & set(fields):
        return LoramError(
            f"{record.where}: one message of a conversation {names_of(record.fields)}",
            'a record holds a whole conversation: {"messages": [{"role": .., "content": ..}, ..]}',
        )
    if {"chosen", "rejected"} <= set(fields):
        hint = "from pairs of answers learn --objective dpo, orpo and kto"
    elif "input_ids" in fields:
        hint = "token ids are not read: give the text that they were made of"
    return LoramError(f"{record.where}: no known layout {names_of(record.fields)}", hint)


def _refuse_choices(fields: Fields) -> None:
    key = fields.first_of(_CHOICES)
    if key is not None and fields.value(key):
        raise LoramError(
            f"{fields.where}: a multiple-choice question: '{key}' would not be read",
            f"write them into the question, and the answer as text; then leave '{key}' out",
        )


def _answer_of(fields: Fields, layout: Layout) -> str:
    of_problem = layout == "question" and "question" not in fields
    key = fields.first_of(_SOLUTIONS if of_problem else _ANSWERS[layout])
    assert key is not None, "the layout is known by its answer"
    return key


def _conversation(fields: Fields, chat: Chat, train_on: TrainOn) -> list[Example]:
    values = fields.values
    key = conversation_key(values)
    given = 0
    pair = _prompt_turns(values) if key is None else None
    if pair is None:
        key = key or further_conversation_key(values)
        assert key is not None, "the layout is known by it"
        turns = decoded(fields.value(key))
    else:
        answer, key = pair
        prompt = [] if key is None else _messages(fields, key, "user")
        given = len(prompt)
        turns = [*prompt, *_messages(fields, answer, "assistant")]
    conversation = read_conversation(
        fields, turns, key or "completion", given=given, train_on=train_on
    )
    return chat.render(conversation)


def _messages(fields: Fields, key: str, role: str) -> list[Any]:
    """A field's messages; a text is one of a role."""
    found = decoded_turns(fields.value(key))
    if isinstance(found, Mapping):
        return [found]
    return found if isinstance(found, list) else [{"role": role, "content": found}]


def _instruction(fields: Fields, chat: Chat, train_on: TrainOn) -> Example:
    """Alpaca's layout; earlier turns of a ``history`` stand before it, and are learnt as well."""
    key = fields.first_of(_INSTRUCTION)
    assert key is not None, "the layout is known by it"
    instruction = fields.text(key)
    context = fields.text_if_any(*(k for k in _CONTEXT if k != key))
    opening = fields.text_if_any(*SYSTEM_KEYS)
    if not opening.strip():
        opening = _WITH_INPUT if context.strip() else _WITHOUT_INPUT
    text = f"{opening}\n\n"
    spans: list[tuple[int, int]] = []
    for question, answer in _history(fields):
        text += f"### Instruction:\n{question}\n\n### Response:\n"
        begin = len(text)
        text += f"{answer}{chat.turn_end()}"
        if train_on == "all" and answer.strip():
            spans.append((begin, len(text)))
        text += "\n\n"
    text += f"### Instruction:\n{instruction}\n\n"
    if context.strip():
        text += f"### Input:\n{context}\n\n"
    text += "### Response:\n"
    begin = len(text)
    text += fields.text(_answer_of(fields, "instruction"))
    if not text[begin:].strip():
        raise UnusableRecord(fields.where, "the answer is empty")
    spans.append((begin, len(text)))
    return example_of_spans(text, tuple(spans), special_tokens=True)


def _history(fields: Fields) -> list[tuple[str, str]]:
    """Earlier instructions and answers.

    Raises:
        UnusableRecord: They are no list of pairs of texts.
    """
    turns = decoded(fields.value("history")) or []
    pairs = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if (
            not isinstance(turn, list)
            or len(turn) != 2
            or not all(isinstance(t, str) for t in turn)
        ):
            raise UnusableRecord(fields.where, "field 'history' must be a list of pairs of texts")
        pairs.append((turn[0], turn[1]))
    return pairs
