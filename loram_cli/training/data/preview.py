"""What training would learn from a data source, without training: for people to look at."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loram_cli.training.choices import Exhausted
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.conversations import TrainOn
from loram_cli.training.data.documents import read_examples
from loram_cli.training.data.examples import Example
from loram_cli.training.data.markers import foreign_markers
from loram_cli.training.data.sources import load_sources
from loram_cli.training.data.tally import Count
from loram_cli.training.data.tokens import IGNORED_LABEL, TokenRow, encode_prompt, tokenize_rows


@dataclass(frozen=True)
class Segment:
    """A part of a row.

    Attributes:
        text: Decoded tokens, special ones included.
        learnt: Whether they carry loss.
        avoided: Whether they are learnt as what not to write: a rejected answer.
    """

    text: str
    learnt: bool
    avoided: bool = False


@dataclass(frozen=True)
class PreviewRow:
    """One row as it is trained on.

    Attributes:
        where: File and line of its record.
        segments: The whole row, in order.
        tokens: Its length.
        learnt_tokens: How many of them carry loss.
        cut: Whether its end is missing.
    """

    where: str
    segments: tuple[Segment, ...]
    tokens: int
    learnt_tokens: int
    cut: bool


@dataclass(frozen=True)
class Preview:
    """What a data source gives.

    Attributes:
        rows: The first rows.
        examples: Examples that were read.
        kept: Examples that keep something to learn within the length.
        cut: Examples longer than the length.
        lengths: Tokens of every example before it was cut.
        tokens: Tokens of all kept rows.
        learnt_tokens: Those of them that carry loss.
        dropped: What is left out, by the reason: records, and examples cut before their answer.
        changed: What was read differently from how it stands there.
        unused: Fields that nothing was done with.
        foreign_markers: Turn markers in the text that are no tokens of this tokenizer.
        has_template: Whether the tokenizer has a chat template for messages.
        told: What reading the data would warn of besides.
    """

    rows: tuple[PreviewRow, ...]
    examples: int
    kept: int
    cut: int
    lengths: tuple[int, ...]
    tokens: int
    learnt_tokens: int
    dropped: dict[str, Count]
    changed: dict[str, Count]
    unused: dict[str, Count]
    foreign_markers: tuple[str, ...]
    has_template: bool
    told: tuple[str, ...] = ()


def preview(
    source: str,
    tokenizer: Any,
    *,
    max_length: int,
    train_on: TrainOn = "all",
    loss_on_prompt: bool = False,
    rows: int = 5,
    limit: int | None = None,
    seed: int = 0,
    exhausted: Exhausted = "stop",
) -> Preview:
    """Read, render and tokenize a source exactly as training does.

    Nothing to learn is no error here: ``kept`` is 0 then, and ``dropped`` says why.

    ``rows`` of them are shown. Without a ``limit`` of records the counts are those of training.

    Raises:
        LoramError: Missing, unreadable or malformed; names file and line.
    """
    chat = Chat(tokenizer)

    def load(name: str) -> list[tuple[str, Example]]:
        return list(read_examples(name, chat, limit=limit, train_on=train_on))

    found = load_sources(source, load, limit=limit, seed=seed, exhausted=exhausted)
    examples = [example for _, example in found]
    done = tokenize_rows(examples, tokenizer, max_length, loss_on_prompt=loss_on_prompt)
    kept = set(done.kept)
    lost = [where for i, (where, _) in enumerate(found) if i not in kept]
    dropped = {**chat.tally.left_out, **_left_without(lost, max_length)}
    return Preview(
        rows=tuple(
            _shown(row, tokenizer, found[place][0], done.lengths[place])
            for row, place in zip(done.rows[:rows], done.kept[:rows], strict=True)
        ),
        examples=len(examples),
        kept=len(done.rows),
        cut=sum(length > max_length for length in done.lengths),
        lengths=tuple(done.lengths),
        tokens=sum(len(row.input_ids) for row in done.rows),
        learnt_tokens=sum(row.learnt_tokens() for row in done.rows),
        dropped=dropped,
        changed=dict(chat.tally.changed),
        unused=dict(chat.tally.unused),
        foreign_markers=foreign_markers((example.text for example in examples), tokenizer),
        has_template=chat.has_template,
    )


def preview_answers(
    answers: Sequence[tuple[str, Example, bool]],
    tokenizer: Any,
    *,
    max_length: int,
    rows: int,
    told: Sequence[str] = (),
) -> Preview:
    """What preferences, judged answers or prompts give; see :func:`preview`.

    Args:
        answers: Each with its name, as an example, and whether it is to be avoided. One without a
            completion is a prompt, whose answer is drawn.
        tokenizer: Makes tokens.
        max_length: Tokens that are kept.
        rows: How many to show.
        told: What reading them warned of.
    """
    examples = [example for _, example, _ in answers]
    done = tokenize_rows(examples, tokenizer, max_length)
    learnt = dict(zip(done.kept, done.rows, strict=True))
    prompts = [i for i, example in enumerate(examples) if not example.completion]
    for place in prompts:
        text = encode_prompt(examples[place].prompt, tokenizer)
        learnt[place] = TokenRow(np.array(text, np.int32), len(text))
    lost = [name for i, (name, _, _) in enumerate(answers) if i not in learnt]
    shown = sorted(learnt)[:rows]
    return Preview(
        rows=tuple(
            _shown(learnt[i], tokenizer, answers[i][0], done.lengths[i], avoided=answers[i][2])
            for i in shown
        ),
        examples=len(answers),
        kept=len(learnt),
        cut=sum(length > max_length for length in done.lengths),
        lengths=tuple(done.lengths),
        tokens=sum(len(row.input_ids) for row in learnt.values()),
        learnt_tokens=sum(row.learnt_tokens() for row in learnt.values()),
        dropped=_left_without(lost, max_length),
        changed={},
        unused={},
        foreign_markers=foreign_markers((example.text for example in examples), tokenizer),
        has_template=Chat(tokenizer).has_template,
        told=tuple(told),
    )


def _left_without(lost: Sequence[str], max_length: int) -> dict[str, Count]:
    """Count the places where no answer is left."""
    reason = f"no answer is left within {max_length} tokens"
    return {reason: Count(len(lost), lost[0])} if lost else {}


def _shown(
    row: TokenRow, tokenizer: Any, where: str, length: int, *, avoided: bool = False
) -> PreviewRow:
    labels = row.labels()
    # The first token has nothing to be predicted from.
    labels[:1] = IGNORED_LABEL
    segments = []
    for learnt, run in itertools.groupby(range(len(labels)), lambda i: labels[i] != IGNORED_LABEL):
        ids = [int(row.input_ids[i]) for i in run]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        segments.append(Segment(text, bool(learnt), bool(learnt) and avoided))
    count = len(row.input_ids)
    # A prompt without an answer has no end-of-sequence token, which the length counts.
    cut = length > count and bool(row.learnt_tokens())
    return PreviewRow(where, tuple(segments), count, row.learnt_tokens(), cut)
