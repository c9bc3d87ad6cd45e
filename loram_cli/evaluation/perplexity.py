"""Perplexity of answers and of plain text: exp of the mean negative log-likelihood per token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loram_cli.errors import LoramError
from loram_cli.reporting import NullReporter, Reporter

_IGNORE = -100


@dataclass(frozen=True)
class Perplexity:
    """The result, weighted by tokens, not by records.

    Args:
        perplexity: ``exp(nll)``.
        nll: Mean negative log-likelihood of a scored token, in nats.
        tokens: Scored tokens.
        records: Records (or windows of text) that they came from.
        truncated: Records that were longer than the model's context and were cut.
        nll_std: Standard deviation of the scored tokens' NLL, for a confidence interval.
    """

    perplexity: float
    nll: float
    tokens: int
    records: int
    truncated: int
    nll_std: float

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity (delta method, tokens taken as independent)."""
        return self.perplexity * self.nll_std / math.sqrt(self.tokens)


def answer_perplexity(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    append_eos: bool = True,
    reporter: Reporter | None = None,
) -> Perplexity:
    r"""Perplexity of completions given their prompts; prompt tokens are context and not scored.

    Args:
        model: A causal LM (plain, quantized, or a PeftModel).
        tokenizer: Its tokenizer; special tokens are added as it adds them.
        pairs: Rendered ``(prompt, completion)`` texts, joined as they are, such as
            ``("Question: ...\nAnswer:", " 42")``.
        batch_size: Records per forward pass.
        max_length: Tokens per record; None takes the model's ``max_position_embeddings``.
            Longer records lose the start of the prompt, then the end of the completion.
        append_eos: Score the end-of-sequence token after the completion, as training does.
        reporter: Receives progress.

    Returns:
        Mean over all scored tokens.

    Raises:
        LoramError: No record has a token to score.
    """
    limit = max_length or context_length(model)
    rows: list[tuple[list[int], int]] = []
    truncated = 0
    for prompt, completion in pairs:
        ids, start = _encode_pair(tokenizer, prompt, completion, append_eos)
        if len(ids) > limit:
            truncated += 1
            # The first token (bos) stays; the answer needs at least one token of context.
            cut = min(len(ids) - limit, start - 1)
            ids, start = ids[:1] + ids[1 + cut :], start - cut
            ids = ids[:limit]
        if start < len(ids):
            rows.append((ids, start))
    return _score(model, tokenizer, rows, batch_size, "perplexity", truncated, reporter)


def text_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    reporter: Reporter | None = None,
) -> Perplexity:
    """Perplexity of plain text under a sliding window, each text on its own.

    Every token but a text's first is scored once, with at least ``window - stride`` tokens of
    context where the text has them.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        texts: Documents.
        window: Tokens per forward pass; None takes the model's context, at most 1024.
        stride: Tokens by which the window moves; None takes half a window.
        batch_size: Windows per forward pass.
        reporter: Receives progress.

    Returns:
        Mean over all scored tokens.

    Raises:
        LoramError: No text has two tokens.
    """
    window = window or min(context_length(model), 1024)
    stride = stride or max(window // 2, 1)
    if not 0 < stride < window:
        raise LoramError(f"stride {stride} must lie between 0 and the window, {window} tokens")
    rows: list[tuple[list[int], int]] = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        scored = 1
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            if scored < end:
                rows.append((ids[begin:end], scored - begin))
            scored = end
            if end == len(ids):
                break
    return _score(model, tokenizer, rows, batch_size, "perplexity", 0, reporter)


def context_length(model: Any) -> int:
    """The model's context in tokens, 2048 where its config does not say."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


def _encode_pair(
    tokenizer: Any, prompt: str, completion: str, append_eos: bool
) -> tuple[list[int], int]:
    """Token ids of the joined text, and the index of the first token to score (at least 1)."""
    head = tokenizer(prompt, verbose=False)["input_ids"]
    ids = list(tokenizer(prompt + completion, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None:
        # Some tokenizers close every text themselves: that eos is no part of the prompt.
        head = head[:-1] if len(head) > 1 and head[-1] == eos else head
        if append_eos and ids[-1:] != [eos]:
            ids.append(eos)
    # A token may span the border; from there on all belongs to the answer.
    start = 0
    while start < min(len(head), len(ids)) and head[start] == ids[start]:
        start += 1
    return ids, max(start, 1)


def _score(
    model: Any,
    tokenizer: Any,
    rows: list[tuple[list[int], int]],
    batch_size: int,
    label: str,
    truncated: int,
    reporter: Reporter | None,
) -> Perplexity:
    if not rows:
        raise LoramError("perplexity: the data has no token to score", "check its answers or texts")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    total, total_squared, tokens = 0.0, 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            (reporter or NullReporter()).progress(label, len(rows), "record") as progress,
        ):
            for ids, mask, labels in _batches(rows, batch_size, pad):
                device = model.device
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                targets = labels[:, 1:].to(logits.device)
                wanted = targets != _IGNORE
                # Only scored positions are raised to float32: a vocabulary is wide.
                nlls = torch.nn.functional.cross_entropy(
                    logits[:, :-1][wanted].float(), targets[wanted], reduction="none"
                ).double()
                total += nlls.sum().item()
                total_squared += nlls.square().sum().item()
                tokens += nlls.numel()
                progress.advance(len(ids))
    finally:
        model.train(was_training)
    nll = total / tokens
    variance = max(total_squared / tokens - nll**2, 0.0)
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(perplexity, nll, tokens, len(rows), truncated, math.sqrt(variance))


def _batches(
    rows: list[tuple[list[int], int]], batch_size: int, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Right-padded (ids, mask, labels), each [batch, sequence]; longest first, to fail early."""
    ordered = sorted(rows, key=lambda row: -len(row[0]))
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        width = len(batch[0][0])
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        labels = torch.full((len(batch), width), _IGNORE)
        for index, (row, start) in enumerate(batch):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
            labels[index, start : len(row)] = ids[index, start : len(row)]
        yield ids, mask, labels
