"""Perplexity of answers and of plain text: exp of the mean negative log-likelihood per token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loram_cli.checkpoint.tokenizer_files import encoding
from loram_cli.errors import LoramError
from loram_cli.evaluation.scoring import SpanScore, TokenSpan
from loram_cli.reporting import NullReporter
from loram_cli.training.data.examples import Example
from loram_cli.training.data.tokens import tokenize_examples


class Scorer(Protocol):
    """Scores token spans, see :class:`.engine.Engine`."""

    def score(self, spans: Sequence[TokenSpan]) -> list[SpanScore]:
        """One score per span, in order."""


@dataclass(frozen=True)
class Perplexity:
    """The result, weighted by tokens, not by records.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: Mean negative log-likelihood of a scored token, in nats.
        tokens: Scored tokens.
        records: Records (or windows of text) that they came from.
        truncated: Records that were cut to the model's context.
        nll_stderr: Standard error of ``nll``; None for a single record.
    """

    perplexity: float
    nll: float
    tokens: int
    records: int
    truncated: int
    nll_stderr: float | None

    @property
    def stderr(self) -> float | None:
        """Standard error of the perplexity (delta method)."""
        return None if self.nll_stderr is None else self.perplexity * self.nll_stderr

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% confidence interval: that of the mean log-likelihood, in its exponential."""
        if self.nll_stderr is None:
            return None
        margin = 1.96 * self.nll_stderr
        return _exp(self.nll - margin), _exp(self.nll + margin)


def answer_perplexity(
    scorer: Scorer, tokenizer: Any, examples: Sequence[Example], context_tokens: int
) -> Perplexity:
    """Perplexity of completions given their prompts; prompt tokens are context and not scored.

    Tokens are those of training, the end-of-sequence token after the completion among them.

    Args:
        scorer: Of the model.
        tokenizer: Its tokenizer.
        examples: Rendered prompts and completions.
        context_tokens: Tokens per record at most. Longer records lose the start of the prompt
            (not its first token, the bos), then the end of the completion.

    Raises:
        LoramError: No record has a token to score.
    """
    rows = tokenize_examples(examples, tokenizer, 2**31, NullReporter())
    spans = []
    truncated = 0
    for row in rows:
        ids, start = row.input_ids.tolist(), max(row.answer_start, 1)
        if len(ids) > context_tokens:
            truncated += 1
            cut = min(len(ids) - context_tokens, start - 1)
            ids, start = ids[:1] + ids[1 + cut :], start - cut
            ids = ids[:context_tokens]
        if start < len(ids):
            spans.append(TokenSpan(tuple(ids), start))
    return _perplexity(scorer, spans, truncated)


def text_perplexity(
    scorer: Scorer,
    tokenizer: Any,
    texts: Sequence[str],
    context_tokens: int,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of plain text under a sliding window, each text on its own.

    Every token but a text's first is scored once, with at least ``window - stride`` tokens of
    context where the text has them.
    The window is the model's context, at most 1024 tokens, unless given; it moves by half.

    Raises:
        LoramError: No text has two tokens.
    """
    window = window or min(context_tokens, 1024)
    stride = stride or max(window // 2, 1)
    if not 0 < stride < window:
        raise LoramError(f"stride {stride} must lie between 0 and the window, {window} tokens")
    spans: list[TokenSpan] = []
    for text in texts:
        with encoding(tokenizer):
            ids = tokenizer(text, verbose=False)["input_ids"]
        scored = 1
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            if scored < end:
                spans.append(TokenSpan(tuple(ids[begin:end]), scored - begin))
            scored = end
            if end == len(ids):
                break
    return _perplexity(scorer, spans, 0)


def context_length(model: Any) -> int:
    """The model's context in tokens, 2048 where its config does not say."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


def _perplexity(scorer: Scorer, spans: list[TokenSpan], truncated: int) -> Perplexity:
    if not spans:
        raise LoramError("perplexity: the data has no token to score", "check its answers or texts")
    scores = scorer.score(spans)
    tokens = sum(score.tokens for score in scores)
    nll = -sum(score.logprob for score in scores) / tokens
    # Tokens of a record depend on one another; records are the independent draws, and the mean
    # over tokens is a ratio of two sums over records.
    stderr = None
    if len(scores) > 1:
        squares = sum((-s.logprob - nll * s.tokens) ** 2 for s in scores)
        stderr = math.sqrt(len(scores) / (len(scores) - 1) * squares) / tokens
    return Perplexity(_exp(nll), nll, tokens, len(spans), truncated, stderr)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
