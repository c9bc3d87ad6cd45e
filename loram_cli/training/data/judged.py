"""Judged answers: a prompt with one answer, and whether it is good or bad."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.examples import Example
from loram_cli.training.data.fields import is_absent, names_of
from loram_cli.training.data.layouts import examples_of
from loram_cli.training.data.loading import Loading, load_each
from loram_cli.training.data.preferences import SIDES, preferred, with_sides
from loram_cli.training.data.records import Record
from loram_cli.training.data.tally import UnusableRecord
from loram_cli.training.data.tokens import tokenize_rows

# TRL's name, and LLaMA-Factory's.
_LABELS = ("label", "kto_tag")
_WORDS: Mapping[Any, bool] = {
    "true": True, "1": True, "good": True, "chosen": True, "desirable": True, "thumbs_up": True,
    "false": False, "0": False, "-1": False, "bad": False, "rejected": False,
    "undesirable": False, "thumbs_down": False,
}  # fmt: skip
_LAYOUT = (
    "an instruction layout with 'label' (true for good, false for bad), or pairs of chosen and "
    "rejected, which give one of each"
)


@dataclass(frozen=True)
class Judged:
    """One answer.

    Attributes:
        example: Prompt and answer, rendered as supervised tuning renders them.
        good: The verdict.
    """

    example: Example
    good: bool

    @property
    def prompt(self) -> str:
        """Its prompt."""
        return self.example.prompt

    @property
    def completion(self) -> str:
        """Its answer."""
        return self.example.completion


@dataclass(frozen=True, slots=True, eq=False)
class JudgedRow:
    """A judged answer as token ids, int32.

    Attributes:
        prompt_ids: What is given.
        completion_ids: The answer, its end-of-sequence token included.
        good: The verdict.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    good: bool


def load_judged(source: str, **how: Unpack[Loading]) -> list[Judged]:
    """Judged answers, in the layouts of TRL's and LLaMA-Factory's data sets.

    ``source`` is as for :func:`.documents.load_instructions`, or ``demo:preferences``.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    found = load_each(source, _judged, "answers", f"layout: {_LAYOUT}", **how)
    if how.get("limit") is None and len({answer.good for answer in found}) < 2:
        only = "good" if found[0].good else "bad"
        raise LoramError(
            f"{source}: all {len(found)} answers are {only}",
            "kto learns from good and bad ones; for good ones only, pass --objective sft",
        )
    return found


def tokenize_judged(
    answers: Sequence[Judged], tokenizer: Any, sequence_length: int, reporter: Reporter
) -> list[JudgedRow]:
    """Token ids, exactly as in supervised tuning; one left without an answer is dropped and told.

    Raises:
        LoramError: None is left, or none that is good, or none that is bad.
    """
    done = tokenize_rows([answer.example for answer in answers], tokenizer, sequence_length)
    rows = [
        JudgedRow(row.input_ids[:start], row.input_ids[start:], answers[place].good)
        for row, place in zip(done.rows, done.kept, strict=True)
        # The first token has nothing to be predicted from.
        if (start := max(row.answer_start, 1)) < len(row.input_ids)
    ]
    cut = sum(length > sequence_length for length in done.lengths)
    if cut:
        reporter.warn(
            f"{cut} of {len(answers)} answers are longer than {sequence_length} tokens and were "
            f"cut, {len(answers) - len(rows)} of them dropped because nothing was left"
        )
    if not rows:
        raise LoramError(
            f"no answer is left within {sequence_length} tokens", "pass a longer --max-length"
        )
    return rows


def side_weights(rows: Sequence[JudgedRow]) -> tuple[float, float]:
    """What a good and a bad answer weigh, so that both kinds weigh the same in all.

    The rarer kind weighs more; the paper (its equation 8) wants a ratio of 1 to 4/3.

    Returns:
        Weight of a good, and of a bad one; the smaller is 1.
    """
    good = sum(row.good for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        return 1.0, 1.0
    return max(1.0, bad / good), max(1.0, good / bad)


def _judged(record: Record, chat: Chat) -> Iterator[Judged]:
    record = with_sides(record)
    fields = record.fields
    if all(side in fields for side in SIDES):
        for side in SIDES:
            yield Judged(preferred(record, side, chat), side == "chosen")
        return
    key = next((key for key in _LABELS if key in fields), None)
    if key is None:
        raise LoramError(
            f"{record.where}: no 'label' {names_of(fields)}",
            f"layout: {_LAYOUT}",
        )
    good = _verdict(fields[key], key, record.where)
    rest = {name: value for name, value in fields.items() if name != key}
    # Only the last turn was judged; those before it are the prompt.
    (*_, example) = examples_of(Record(rest, record.where), chat, train_on="last")
    yield Judged(example, good)


def _verdict(value: Any, key: str, where: str) -> bool:
    if is_absent(value):
        raise UnusableRecord(where, f"'{key}' is null")
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1, -1):
        return value == 1
    found = _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise LoramError(
            f"{where}: '{key}' is neither true nor false", "true is a good answer, false a bad one"
        )
    return found
