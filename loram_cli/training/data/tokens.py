"""Training data as token ids: packed blocks, rows with a masked prompt, padded batches."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from loram_cli.checkpoint.tokenizer_files import encoding
from loram_cli.errors import LoramError
from loram_cli.quiet import quiet_libraries
from loram_cli.reporting import Reporter
from loram_cli.training.data import spool
from loram_cli.training.data.examples import Example
from loram_cli.training.data.spool import Spool

IGNORED_LABEL = -100
_TEXTS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One sequence to train on.

    Attributes:
        input_ids: Token ids, shape (length,), int32.
        answer_start: Tokens before this index carry no loss; 0 means that all do.
        given: Ranges of later tokens that carry none either, in order: the user's turns between
            the assistant's.
    """

    input_ids: np.ndarray
    answer_start: int = 0
    given: tuple[tuple[int, int], ...] = ()

    def labels(self) -> np.ndarray:
        """The ids, int64, with ``IGNORED_LABEL`` in place of those that carry no loss."""
        labels = self.input_ids.astype(np.int64)
        for begin, end in ((0, self.answer_start), *self.given):
            labels[begin:end] = IGNORED_LABEL
        return labels

    def learnt_tokens(self) -> int:
        """Tokens that carry loss; the first has nothing to be predicted from."""
        return int((self.labels()[1:] != IGNORED_LABEL).sum())


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as token ids.

    Attributes:
        ids: Of the whole text.
        start: The index at which the completion begins.
        given: Ranges of later tokens that are given as well, in order.
    """

    ids: list[int]
    start: int
    given: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Examples as rows.

    Attributes:
        rows: Those that keep something to learn.
        kept: For each row, the index of its example.
        lengths: Tokens of every example before it was cut, in the order of the examples.
    """

    rows: Sequence[TokenRow]
    kept: list[int]
    lengths: list[int]


def pack_tokens(texts: Iterable[str], tokenizer: Any, block_length: int) -> list[TokenRow]:
    """Join documents with the end-of-sequence token and cut the run into equal blocks.

    No padding, and no token lost but the last incomplete block. Own code because the packing of
    trl leaves a short block at the end of every thousand documents.

    Returns:
        Blocks whose ids all have shape (block_length,).

    Raises:
        LoramError: The text fills no block.
    """
    eos = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    with quiet_libraries(), encoding(tokenizer):
        for chunk in _chunks(texts):
            for ids in tokenizer(chunk)["input_ids"]:
                ids = ids[doubled_bos(ids, tokenizer) :]
                ends = eos is None or (ids and ids[-1] == eos)
                parts.append(np.array(ids if ends else [*ids, eos], dtype=np.int32))
    run = np.concatenate(parts) if parts else np.empty(0, np.int32)
    blocks = len(run) // block_length
    if blocks == 0:
        raise LoramError(
            f"the text has {len(run)} tokens, less than one block of {block_length}",
            "pass more text, or a shorter --block-length",
        )
    return [TokenRow(row) for row in run[: blocks * block_length].reshape(blocks, block_length)]


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    sequence_length: int,
    reporter: Reporter,
    *,
    loss_on_prompt: bool = False,
) -> Sequence[TokenRow]:
    """Token ids of prompt, completion and end-of-sequence, with the prompt masked.

    Prompt and completion are tokenized as one text, as they meet when the model generates.

    Longer rows are cut at the end, and one left without an answer is dropped, with a warning.

    Raises:
        LoramError: No row is left.
    """
    if tokenizer.eos_token_id is None:
        reporter.warn("the tokenizer has no end-of-sequence token: answers will not learn to end")
    done = tokenize_rows(examples, tokenizer, sequence_length, loss_on_prompt=loss_on_prompt)
    cut = sum(length > sequence_length for length in done.lengths)
    dropped = len(examples) - len(done.rows)
    if dropped and not cut:
        reporter.warn(
            f"{dropped} of {len(examples)} examples dropped: no token of theirs is learnt"
        )
    if cut:
        reporter.warn(
            f"{cut} of {len(examples)} examples are longer than {sequence_length} tokens and were "
            f"cut, {dropped} of them dropped because no answer was left"
        )
    if not done.rows:
        raise LoramError(
            f"no example keeps an answer within {sequence_length} tokens",
            "pass a longer --max-length",
        )
    return done.rows


def tokenize_rows(
    examples: Sequence[Example],
    tokenizer: Any,
    sequence_length: int,
    *,
    loss_on_prompt: bool = False,
) -> Tokenized:
    """As :func:`tokenize_examples`, telling which examples keep something to learn."""
    eos = tokenizer.eos_token_id
    kept: list[int] = []
    lengths: list[int] = []
    # Ids that exceed the memory that data may take are kept in a file.
    rows: Spool[TokenRow] = Spool(lambda row: row.input_ids.nbytes, spool.MEMORY_BYTES)
    for chunk in _chunks(enumerate(examples)):
        encoded = encode_examples([example for _, example in chunk], tokenizer)
        for (place, _), one in zip(chunk, encoded, strict=True):
            ids = one.ids
            # Each turn before the last ends as the template, or the layout, ends it.
            last_turn = max([one.start, *(end for _, end in one.given if end < len(ids))])
            if eos is not None and eos not in ids[last_turn:]:
                ids = [*ids, eos]
            lengths.append(len(ids))
            row = TokenRow(np.array(ids[:sequence_length], np.int32), one.start, one.given)
            if not row.learnt_tokens():
                continue
            kept.append(place)
            rows.append(TokenRow(row.input_ids) if loss_on_prompt else row)
    return Tokenized(rows if rows.on_disk else list(rows), kept, lengths)


class PadCollator:
    """Pads rows on the right into a batch of int64 tensors, shape (batch, longest).

    There is no attention mask: padding stands after every real token, so causal attention never
    looks at it, and without a mask attention takes its fast causal path.
    """

    def __init__(self, pad_token_id: int, multiple: int = 1) -> None:
        self.pad = pad_token_id
        self.multiple = multiple

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``."""
        longest = max(len(row.input_ids) for row in rows)
        shape = (len(rows), -(-longest // self.multiple) * self.multiple)
        ids = np.full(shape, self.pad, np.int64)
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            ids[i, :length] = row.input_ids
            labels[i, :length] = row.labels()
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _chunks(items: Iterable[Any]) -> Iterable[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _TEXTS_AT_A_TIME)):
        yield chunk


def encode_examples(examples: Sequence[Example], tokenizer: Any) -> Iterator[Encoded]:
    """Ids of each whole text, and which of them are given.

    A prompt that begins with the beginning-of-sequence token, as a template wrote it, gets no
    second one. A token that spans the border to what is learnt is learnt.
    """
    for special in (True, False):
        if all(example.special_tokens == special for example in examples):
            several = any(example.given for example in examples)
            extra = {"return_offsets_mapping": True} if several else {}
            with quiet_libraries(), encoding(tokenizer):
                whole = tokenizer([e.text for e in examples], add_special_tokens=special, **extra)
                prompts = tokenizer([e.prompt for e in examples], add_special_tokens=special)
            for i, example in enumerate(examples):
                drop = doubled_bos(whole["input_ids"][i], tokenizer)
                ids = whole["input_ids"][i][drop:]
                prompt = prompts["input_ids"][i]
                start = _common_length(ids, prompt[doubled_bos(prompt, tokenizer) :])
                given: tuple[tuple[int, int], ...] = ()
                if example.given:
                    given = _given_tokens(whole["offset_mapping"][i][drop:], example.spans)
                yield Encoded(ids, start, given)
            return
    for example in examples:
        yield from encode_examples([example], tokenizer)


def encode_prompt(prompt: str, tokenizer: Any, *, special_tokens: bool = True) -> list[int]:
    """Ids of a prompt, without a second beginning-of-sequence token where it has written one.

    Raises:
        LoramError: It is no text that a tokenizer takes.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        # As bytes on the command line that are not UTF-8 become.
        raise LoramError(
            f"the prompt is not UTF-8: its character {error.start + 1} is half of one"
        ) from error
    with encoding(tokenizer):
        ids = list(tokenizer(prompt, add_special_tokens=special_tokens, verbose=False)["input_ids"])
    return ids[doubled_bos(ids, tokenizer) :]


def doubled_bos(ids: Sequence[int], tokenizer: Any) -> int:
    """1 where the ids begin with the beginning-of-sequence token twice, else 0."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return int(bos is not None and list(ids[:2]) == [bos, bos])


def _given_tokens(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Ranges of tokens between and behind the spans of characters that are learnt."""
    # Special tokens that the tokenizer adds stand at 0: those at the end belong to the last span.
    starts = np.maximum.accumulate(np.array([begin for begin, _ in offsets], np.int64))
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64))
    learnt = [
        (int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(starts, end, "left")))
        for begin, end in spans
    ]
    given = [(end, begin) for (_, end), (begin, _) in itertools.pairwise(learnt)]
    given.append((learnt[-1][1], len(offsets)))
    return tuple((begin, end) for begin, end in given if begin < end)


def _common_length(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
