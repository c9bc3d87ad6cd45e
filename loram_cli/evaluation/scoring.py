"""Log-likelihoods of given tokens, batch by batch: for perplexity and for multiple choice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loram_cli.errors import LoramError
from loram_cli.evaluation.batching import GrowingBatch


@dataclass(frozen=True)
class TokenSpan:
    """Token ids of which those from ``start`` (at least 1) on are scored."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class SpanScore:
    """The score of a span.

    Attributes:
        logprob: Sum over the scored tokens, in nats.
        tokens: How many were scored.
        greedy: Whether each of them was the likeliest.
    """

    logprob: float
    tokens: int
    greedy: bool


def score_spans(
    model: Any,
    spans: Sequence[TokenSpan],
    batching: GrowingBatch,
) -> Iterator[list[tuple[int, SpanScore]]]:
    """Places and scores of all spans, batch by batch.

    Spans are at most one token longer than the context: the last one is no input.
    """
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i].ids))

    def work(places: Sequence[int]) -> list[tuple[int, SpanScore]]:
        return list(zip(places, _score(model, [spans[i] for i in places]), strict=True))

    return batching.run(order, lambda i: len(spans[i].ids), work)


def refuse_nan(values: torch.Tensor, model: Any) -> None:
    """Refuse what a model gives where it is no number: the likeliest of it would be any token.

    Args:
        values: Of any shape.
        model: Gave them.

    Raises:
        LoramError: One is NaN.
    """
    if values.isnan().any():
        name = getattr(model, "name_or_path", "") or "the model"
        raise LoramError(
            f"{name}: gives NaN where logits are expected",
            "its weights, or those of its adapter, hold NaN or overflow in their type",
        )


def _score(model: Any, spans: Sequence[TokenSpan]) -> list[SpanScore]:
    """Right-padded, [batch, sequence]; causal attention never looks at the padding after a row."""
    width = max(len(span.ids) for span in spans) - 1
    ids = torch.zeros((len(spans), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    targets = torch.zeros_like(ids)
    for row, span in enumerate(spans):
        length = len(span.ids) - 1
        whole = torch.tensor(span.ids)
        ids[row, :length], targets[row, :length] = whole[:-1], whole[1:]
        mask[row, :length] = 1
        wanted[row, span.start - 1 : length] = True
    device = model.device
    with torch.inference_mode():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        wanted, targets = wanted.to(logits.device), targets.to(logits.device)
        # Only scored positions are raised to float32: a vocabulary is wide.
        scored, chosen = logits[wanted].float(), targets[wanted]
        logprobs = -torch.nn.functional.cross_entropy(scored, chosen, reduction="none").double()
        refuse_nan(logprobs, model)
        greedy = scored.argmax(-1) == chosen
    counts = wanted.sum(-1).tolist()
    return [
        SpanScore(row_logprobs.sum().item(), count, bool(row_greedy.all()))
        for row_logprobs, row_greedy, count in zip(
            logprobs.split(counts), greedy.split(counts), counts, strict=True
        )
    ]
