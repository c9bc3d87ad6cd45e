"""Preference data: a prompt with an answer that is chosen and one that is rejected."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.training.data.chat import Chat, shared_length
from loram_cli.training.data.conversations import are_turns
from loram_cli.training.data.examples import Example
from loram_cli.training.data.fields import as_text, is_absent, names_of, present
from loram_cli.training.data.json_text import decoded_turns
from loram_cli.training.data.layouts import Layout, examples_of, layout_of, opens
from loram_cli.training.data.loading import Loading, load_each
from loram_cli.training.data.records import Record
from loram_cli.training.data.tally import UnusableRecord
from loram_cli.training.data.tokens import encode_examples

SIDES = ("chosen", "rejected")
# Of OpenAI's and LLaMA-Factory's files, and of others.
_OTHER_SIDES = {
    "chosen": ("chosen_response", "chosen_messages", "preferred_output"),
    "rejected": ("rejected_response", "rejected_messages", "non_preferred_output"),
}
_PROMPTS = ("prompt", "question", "instruction", "input", "output", "messages", "conversations")
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


def load_preferences(source: str, **how: Unpack[Loading]) -> list[Preference]:
    """Preferences of a source, in the layouts of TRL's and LLaMA-Factory's data sets.

    ``source`` is as for :func:`.documents.load_instructions`, or ``demo:preferences``.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    return load_each(source, _pair, "preferences", f"layout: {_LAYOUTS}", **how)


def _pair(record: Record, chat: Chat) -> Iterator[Preference]:
    record = with_sides(record)
    pair = Preference(*(preferred(record, side, chat) for side in SIDES))
    if pair.chosen.completion.strip() == pair.rejected.completion.strip():
        raise UnusableRecord(record.where, "chosen and rejected are the same")
    yield pair


def tokenize_pairs(
    pairs: Sequence[Preference], tokenizer: Any, sequence_length: int, reporter: Reporter
) -> list[PairRow]:
    """Token ids of both answers behind the part of the prompt that they share.

    Prompt and answer are tokenized as one text, exactly as in supervised tuning.

    Longer sequences are cut at the end; a pair that is then the same on both sides, or has an
    answer missing, is dropped, and the user told.

    Raises:
        LoramError: No pair is left.
    """
    eos = tokenizer.eos_token_id
    sides = [
        list(encode_examples([getattr(pair, side) for pair in pairs], tokenizer)) for side in SIDES
    ]
    rows: list[PairRow] = []
    cut = dropped = 0
    for better, worse in zip(*sides, strict=True):
        chosen, rejected = better.ids, worse.ids
        start = min(better.start, worse.start)
        ids = []
        for side in (chosen, rejected):
            whole = side if eos is None or eos in side[start:] else [*side, eos]
            ids.append(np.array(whole[:sequence_length], np.int32))
        cut += max(len(chosen), len(rejected)) + (eos is not None) > sequence_length
        if min(map(len, ids)) <= max(start, 1) or np.array_equal(ids[0], ids[1]):
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


def with_sides(record: Record) -> Record:
    """With the answers as ``chosen`` and ``rejected``, and the prompt beside them.

    Of two texts without a prompt, what they begin with is the prompt, up to a space, as TRL has it.
    """
    fields = dict(record.fields)
    for side, others in _OTHER_SIDES.items():
        for name in others:
            if side not in fields and name in fields:
                fields[side] = fields.pop(name)
    asked = fields.get("input")
    if isinstance(asked, Mapping) and "messages" in asked:
        # OpenAI's: messages and tools in one field.
        fields = {**{k: v for k, v in fields.items() if k != "input"}, **asked}
    texts = [fields.get(side) for side in SIDES]
    if all(isinstance(text, str) and not are_turns(decoded_turns(text)) for text in texts) and not (
        set(_PROMPTS) & set(present(fields))
    ):
        prompt, *answers = _parted(*map(str, texts))
        if prompt.strip():
            fields |= {"prompt": prompt, **dict(zip(SIDES, answers, strict=True))}
    return Record(fields, record.where)


def _parted(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning of two texts, up to its last space, and what follows in each."""
    end = shared_length(chosen, rejected)
    while end and not chosen[end - 1].isspace():
        end -= 1
    # The space belongs to the answer, as tokenizers have it.
    end = len(chosen[:end].rstrip(" "))
    return chosen[:end], chosen[end:], rejected[end:]


def preference_layout(record: Record) -> Layout | None:
    """The layout of supervised tuning in which a preference is learnt; None where it is none."""
    fields = present(with_sides(record).fields)
    plain = _plain(fields, decoded_turns(fields["chosen"])) if "chosen" in fields else None
    return None if plain is None else layout_of(plain)


def preferred(record: Record, side: str, chat: Chat) -> Example:
    """The record as if one of its answers were the only one.

    Raises:
        UnusableRecord: An answer is null, or empty.
        LoramError: There is no such answer, or no prompt.
    """
    fields = record.fields
    for name in SIDES:
        if name not in fields:
            raise LoramError(
                f"{record.where}: field '{name}' of a preference is missing {names_of(fields)}",
                f"layout: {_LAYOUTS}",
            )
        if is_absent(fields[name]):
            raise UnusableRecord(record.where, f"'{name}' is null")
    answer = decoded_turns(fields[side])
    if not isinstance(answer, list | Mapping):
        answer = as_text(answer, f"field '{side}'", record.where, chat.tally)
    plain = _plain(present(fields), answer)
    if plain is None:
        raise LoramError(
            f"{record.where}: no prompt beside '{side}' {names_of(fields)}",
            f"layout: {_LAYOUTS}",
        )
    # Only the last turn is an answer that was preferred; those before it are the prompt.
    return examples_of(Record(plain, record.where), chat, train_on="last")[-1]


def _plain(fields: Mapping[str, Any], answer: Any) -> dict[str, Any] | None:
    """Fields of supervised tuning that say the same; None where there is no prompt."""
    rest = {k: v for k, v in fields.items() if k not in (*SIDES, *_PROMPTS)}
    prompt = decoded_turns(fields.get("prompt"))
    turns = [answer] if isinstance(answer, Mapping) else answer
    if isinstance(answer, str):
        if prompt is not None and not isinstance(prompt, list):
            return {**rest, "prompt": fields["prompt"], "completion": answer}
        if "question" in fields:
            return {**rest, "question": fields["question"], "answer": answer}
        if "instruction" in fields:
            kept = {k: fields[k] for k in ("instruction", "input") if k in fields}
            return {**rest, **kept, "output": answer}
        if isinstance(fields.get("input"), str):
            return {**rest, "input": fields["input"], "output": answer}
        turns = [{"role": "assistant", "content": answer}]
    if are_turns(turns) and opens(turns):
        # Both answers are whole conversations; what stands beside them repeats a part of them.
        return {**rest, "messages": turns}
    for key in ("prompt", "messages", "conversations"):
        before = decoded_turns(fields.get(key))
        if isinstance(before, list):
            return {**rest, "messages": [*before, *turns]}
    if isinstance(prompt, str):
        return {**rest, "messages": [{"role": "user", "content": prompt}, *turns]}
    return None
