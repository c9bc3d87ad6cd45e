"""Questions with an answer that can be checked: what a policy is rewarded for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.conversations import CONVERSATION_KEYS, SYSTEM_KEYS
from loram_cli.training.data.fields import as_text, is_absent, names_of, present
from loram_cli.training.data.json_text import decoded_turns
from loram_cli.training.data.layouts import examples_of
from loram_cli.training.data.loading import Loading, load_each
from loram_cli.training.data.records import Record
from loram_cli.training.data.tally import UnusableRecord

_MARK = "####"
_STAND_IN = "."
_NAMES_OF_TRL = ("prompt", "prompts", "completion", "completions", "completion_ids")
_LAYOUT = "grpo takes word problems: question, and answer ending in '#### N'"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: As supervised tuning and ``eval`` render it.
        answer: The data set's own answer, ending in ``#### N``; empty where none is compared.
        fields: The record's further fields, for rewards of the user's own.
    """

    prompt: str
    answer: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def load_questions(
    source: str, *, numbers: bool = True, own_rewards: bool = False, **how: Unpack[Loading]
) -> list[Question]:
    """Word problems in GSM8K's layout, or prompts in any layout where own functions reward.

    ``source`` is as for :func:`.documents.load_instructions`.

    Args:
        source: Where they come from.
        numbers: Whether an answer must hold a number to compare with.
        own_rewards: Whether all fields of a record are kept, for functions of the user's own.
        how: See :class:`.loading.Loading`.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    tokenizer = how.get("tokenizer")

    def read(record: Record, chat: Chat) -> Iterator[Question]:
        found = _question(record, chat) if numbers else Question("", "")
        if not own_rewards:
            yield found
            return
        prompt = found.prompt or _prompt(record, chat, tokenizer)
        yield Question(prompt, found.answer, _plain_fields(record))

    if not own_rewards:
        # Word problems are no messages.
        how["tokenizer"] = None
    return load_each(source, read, "questions", _LAYOUT, **how)


def _prompt(record: Record, chat: Chat, tokenizer: Any) -> str:
    """The prompt of a record in any instruction layout, its answer left to the policy."""
    fields = present(record.fields)
    asked = _asked(fields)
    if asked is None:
        raise LoramError(
            f"{record.where}: no prompt {names_of(fields)}",
            "grpo takes prompt, question, instruction(+input) or messages",
        )
    kept = {k: fields[k] for k in (*SYSTEM_KEYS, "tools") if k in fields}
    (*_, example) = examples_of(Record({**kept, **asked}, record.where), chat, train_on="last")
    bos: str = getattr(tokenizer, "bos_token", None) or ""
    twice = not example.special_tokens and bos != "" and example.prompt.startswith(bos)
    if twice and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        # A template has written what the tokenizer adds to a text once more.
        return example.prompt[len(bos) :]
    return example.prompt


def _asked(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of supervised tuning with a stand-in for the answer."""
    for key in (*CONVERSATION_KEYS, "prompt"):
        turns = decoded_turns(fields.get(key))
        if isinstance(turns, list):
            while turns and _is_answer(turns[-1]):
                turns = turns[:-1]
            return {"messages": [*turns, {"role": "assistant", "content": _STAND_IN}]}
    if "prompt" in fields:
        return {"prompt": fields["prompt"], "completion": _STAND_IN}
    if "question" in fields:
        return {"question": fields["question"], "answer": _STAND_IN}
    if "instruction" in fields:
        kept = {k: fields[k] for k in ("instruction", "input") if k in fields}
        return {**kept, "output": _STAND_IN}
    return None


def _is_answer(turn: Any) -> bool:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return role in ("assistant", "gpt", "model")


def _plain_fields(record: Record) -> dict[str, Any]:
    """The fields as JSON holds them; those that TRL gives names to are its own."""
    plain = json.loads(json.dumps(dict(record.fields), default=str))
    return {str(k): v for k, v in plain.items() if k not in _NAMES_OF_TRL}


def _question(record: Record, chat: Chat) -> Question:
    fields = record.fields
    for name in ("question", "answer"):
        if name not in fields:
            raise LoramError(
                f"{record.where}: field '{name}' is missing {names_of(fields)}",
                f"{_LAYOUT}; to reward otherwise, pass --reward FILE.py:FUNCTION",
            )
        if is_absent(fields[name]):
            raise UnusableRecord(record.where, f"'{name}' is null")
    answer = fields["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        # Only the number is compared.
        chat.tally.change("a numeric answer was read as '#### N'", record.where)
        answer = f"{_MARK} {answer:g}" if isinstance(answer, float) else f"{_MARK} {answer}"
    answer = as_text(answer, "field 'answer'", record.where, chat.tally)
    if not any(c.isdigit() for c in answer.rpartition(_MARK)[2]) or _MARK not in answer:
        raise LoramError(
            f"{record.where}: the answer does not end in '{_MARK} N', so that no number can "
            "be checked",
            "to reward otherwise, pass --reward FILE.py:FUNCTION",
        )
    asked_for = {"question": fields["question"], "answer": answer}
    (example,) = examples_of(Record(asked_for, record.where), chat)
    return Question(example.prompt, answer)


def fitting_questions(
    questions: Sequence[Question],
    lengths: Sequence[int],
    most: int,
    reporter: Reporter,
) -> list[Question]:
    """Those whose prompt leaves room for a completion.

    Raises:
        LoramError: None is left.
    """
    kept = [q for q, length in zip(questions, lengths, strict=True) if length <= most]
    if len(kept) < len(questions):
        reporter.warn(
            f"{len(questions) - len(kept)} of {len(questions)} questions left out: longer than "
            f"{most} tokens, the part of --max-length that completions do not take"
        )
    if not kept:
        raise LoramError(
            f"no question is shorter than {most} tokens",
            "pass a longer --max-length, or a shorter --max-completion-length",
        )
    return kept
