"""Training data as token ids: packed blocks, rows with a masked prompt, padded batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from loram_cli.errors import LoramError
from loram_cli.quiet import quiet_libraries
from loram_cli.reporting import Reporter
from loram_cli.training.data.documents import Example

IGNORED_LABEL = -100
_TEXTS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One sequence to train on.

    Attributes:
        input_ids: Token ids, shape (length,), int32.
        answer_start: Tokens before this index carry no loss; 0 means that all do.
    """

    input_ids: np.ndarray
    answer_start: int = 0


def pack_tokens(texts: Iterable[str], tokenizer: Any, block_length: int) -> list[TokenRow]:
    """Join documents with the end-of-sequence token and cut the run into equal blocks.

    No padding, and no token lost but the last incomplete block. Own code because the packing of
    trl leaves a short block at the end of every thousand documents.

    Args:
        texts: Documents.
        tokenizer: A Hugging Face tokenizer.
        block_length: Tokens per block.

    Returns:
        Blocks whose ids all have shape (block_length,).

    Raises:
        LoramError: The text fills no block.
    """
    eos = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    with quiet_libraries():
        for chunk in _chunks(texts):
            for ids in tokenizer(chunk)["input_ids"]:
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
) -> list[TokenRow]:
    """Token ids of prompt, completion and end-of-sequence, with the prompt masked.

    Prompt and completion are tokenized as one text, as they meet when the model generates.

    Args:
        examples: What to learn.
        tokenizer: A Hugging Face tokenizer.
        sequence_length: Longer rows are cut at the end; one left without an answer is dropped.
        reporter: Told how many were cut and dropped.
        loss_on_prompt: Learn the prompt's tokens as well.

    Raises:
        LoramError: No row is left.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        reporter.warn("the tokenizer has no end-of-sequence token: answers will not learn to end")
    rows: list[TokenRow] = []
    cut = dropped = 0
    for chunk in _chunks(examples):
        for ids, start in encode_examples(chunk, tokenizer):
            if eos is not None and eos not in ids[start:]:
                ids = [*ids, eos]
            if len(ids) > sequence_length:
                cut += 1
                ids = ids[:sequence_length]
            # The first token of a sequence has nothing to be predicted from.
            if len(ids) <= max(start, 1):
                dropped += 1
                continue
            rows.append(TokenRow(np.array(ids, np.int32), 0 if loss_on_prompt else start))
    if cut:
        reporter.warn(
            f"{cut} of {len(examples)} examples are longer than {sequence_length} tokens and were "
            f"cut, {dropped} of them dropped because no answer was left"
        )
    if not rows:
        raise LoramError(
            f"no example keeps an answer within {sequence_length} tokens",
            "pass a longer --max-length",
        )
    return rows


def without_loss(row: TokenRow) -> TokenRow:
    """The beginning of a row, of which no token carries loss."""
    ids = row.input_ids[:2]
    return TokenRow(ids, len(ids))


class PadCollator:
    """Pads rows on the right into a batch of int64 tensors, shape (batch, longest).

    There is no attention mask: padding stands after every real token, so causal attention never
    looks at it, and without a mask attention takes its fast causal path.
    """

    def __init__(self, pad_token_id: int, multiple: int = 1) -> None:
        self._pad = pad_token_id
        self._multiple = multiple

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``."""
        longest = max(len(row.input_ids) for row in rows)
        shape = (len(rows), -(-longest // self._multiple) * self._multiple)
        ids = np.full(shape, self._pad, np.int64)
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            ids[i, :length] = row.input_ids
            labels[i, row.answer_start : length] = row.input_ids[row.answer_start :]
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def _chunks(items: Iterable[Any]) -> Iterable[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _TEXTS_AT_A_TIME)):
        yield chunk


def encode_examples(examples: Sequence[Example], tokenizer: Any) -> Iterable[tuple[list[int], int]]:
    """Ids of each whole text and the index at which its completion begins."""
    for special in (True, False):
        if all(example.special_tokens == special for example in examples):
            with quiet_libraries():
                whole = tokenizer(
                    [e.prompt + e.completion for e in examples], add_special_tokens=special
                )["input_ids"]
                prompts = tokenizer([e.prompt for e in examples], add_special_tokens=special)
            for ids, prompt in zip(whole, prompts["input_ids"], strict=True):
                yield ids, _common_length(ids, prompt)
            return
    for example in examples:
        yield from encode_examples([example], tokenizer)


def _common_length(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
