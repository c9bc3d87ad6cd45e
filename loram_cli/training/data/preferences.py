"""Preference data: a prompt with an answer that is chosen and one that is rejected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.training.data.layouts import Chat, Example, examples_of
from loram_cli.training.data.records import Record, read_records
from loram_cli.training.data.tokens import encode_examples

_SIDES = ("chosen", "rejected")
_LAYOUTS = (
    "prompt, chosen and rejected, each text or a list of messages; the prompt may also be "
    "instruction(+input), question, messages or conversations, or the beginning of both answers"
)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, rendered as supervised tuning renders them.

    Attributes:
        chosen: The prompt with the better answer.
        rejected: The same prompt with the worse one.
    """

    chosen: Example
    rejected: Example


@dataclass(frozen=True, slots=True, eq=False)
class PairRow:
    """A preference as token ids, int32.

    Attributes:
        prompt_ids: What both sequences begin with.
        chosen_ids: The better answer, its end-of-sequence token included.
        rejected_ids: The worse one.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray


def load_preferences(
    source: str,
    *,
    tokenizer: Any | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> list[Preference]:
    """Preferences of a source, in the layouts of TRL's and LLaMA-Factory's data sets.

    Args:
        source: As :func:`.data.load_instructions` takes it, or ``demo:preferences``.
        tokenizer: Whose chat template renders messages.
        limit: Read at most so many records.
        reporter: Told of pairs that are left out.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    reporter = reporter or NullReporter()
    chat = Chat(tokenizer)
    pairs: list[Preference] = []
    equal: list[str] = []
    for record in read_records(source, limit=limit):
        pair = Preference(*(_example(record, side, chat) for side in _SIDES))
        if pair.chosen.completion.strip() == pair.rejected.completion.strip():
            equal.append(record.where)
        else:
            pairs.append(pair)
    if equal:
        reporter.warn(
            f"{source}: {len(equal)} pairs left out, chosen and rejected are the same "
            f"(the first: {equal[0]})"
        )
    chat.warn_of_fallback(reporter)
    if not pairs:
        raise LoramError(f"{source}: no preferences in it", f"layout: {_LAYOUTS}")
    return pairs


def tokenize_pairs(
    pairs: Sequence[Preference], tokenizer: Any, sequence_length: int, reporter: Reporter
) -> list[PairRow]:
    """Token ids of both answers behind the part of the prompt that they share.

    Prompt and answer are tokenized as one text, exactly as in supervised tuning.

    Args:
        pairs: What to learn.
        tokenizer: A Hugging Face tokenizer.
        sequence_length: Longer sequences are cut at the end; a pair that is then the same on both
            sides, or has an answer missing, is dropped.
        reporter: Told how many were cut and dropped.

    Raises:
        LoramError: No pair is left.
    """
    eos = tokenizer.eos_token_id
    sides = [
        list(encode_examples([getattr(pair, side) for pair in pairs], tokenizer)) for side in _SIDES
    ]
    rows: list[PairRow] = []
    cut = dropped = 0
    for (chosen, start), (rejected, other) in zip(*sides, strict=True):
        start = min(start, other)
        ids = []
        for side in (chosen, rejected):
            whole = side if eos is None or eos in side[start:] else [*side, eos]
            ids.append(np.array(whole[:sequence_length], np.int32))
        cut += max(len(chosen), len(rejected)) + (eos is not None) > sequence_length
        if min(map(len, ids)) <= max(start, 1) or np.array_equal(*ids):
            dropped += 1
            continue
        rows.append(PairRow(ids[0][:start], ids[0][start:], ids[1][start:]))
    if cut:
        reporter.warn(
            f"{cut} of {len(pairs)} pairs are longer than {sequence_length} tokens and were cut, "
            f"{dropped} of them dropped because nothing was left to tell them apart"
        )
    if not rows:
        raise LoramError(
            f"no pair keeps two different answers within {sequence_length} tokens",
            "pass a longer --max-length",
        )
    return rows


def _example(record: Record, side: str, chat: Chat) -> Example:
    """The record as if one of its answers were the only one."""
    fields = record.fields
    for name in _SIDES:
        if fields.get(name) is None:
            raise LoramError(
                f"{record.where}: field '{name}' of a preference is missing "
                f"(fields: {', '.join(map(str, fields)) or 'none'})",
                f"layout: {_LAYOUTS}",
            )
    answer = fields[side]
    if not isinstance(answer, str | list | Mapping):
        raise LoramError(f"{record.where}: field '{side}' must be text or messages")
    plain = _plain(fields, answer)
    if plain is None:
        raise LoramError(
            f"{record.where}: no prompt beside '{side}' "
            f"(fields: {', '.join(map(str, fields)) or 'none'})",
            f"layout: {_LAYOUTS}",
        )
    return examples_of(Record(plain, record.where), chat)[-1]


def _plain(fields: Mapping[str, Any], answer: Any) -> dict[str, Any] | None:
    """Fields of supervised tuning that say the same; None where there is no prompt."""
    turns = [answer] if isinstance(answer, Mapping) else answer
    if isinstance(answer, str):
        if isinstance(fields.get("prompt"), str):
            return {"prompt": fields["prompt"], "completion": answer}
        if fields.get("question") is not None:
            return {"question": fields["question"], "answer": answer}
        if fields.get("instruction") is not None:
            return {**fields, "output": answer}
        turns = [{"role": "assistant", "content": answer}]
    for key in ("prompt", "messages", "conversations"):
        if isinstance(fields.get(key), list):
            return {"messages": [*fields[key], *turns]}
    if len(turns) > 1:
        # Both answers are whole conversations; a prompt beside them repeats their beginning.
        return {"messages": turns}
    if isinstance(fields.get("prompt"), str):
        return {"messages": [{"role": "user", "content": fields["prompt"]}, *turns]}
    return None
