"""Cross-entropy of a causal LM without its logits ever being whole in memory.

A vocabulary of 128k makes 512 KiB of fp32 logits per token, and cross-entropy's backward pass holds
them three times over. Here only tokens that carry loss pass the head, a few at a time, and their
logits are computed again in the backward pass. Loss and gradients are those of the plain
computation; with dropout on the head's LoRA factors, its mask falls differently.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from loram_cli.memory.setup import chunk_tokens

_IGNORED_LABEL = -100


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    chunk: int,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean negative log-likelihood of each next token that carries loss.

    Args:
        hidden: Final hidden states, shape (batch, length, hidden).
        labels: Token ids, shape (batch, length); -100 where there is no loss.
        logits_of: The head: (tokens, hidden) to (tokens, vocab_size).
        chunk: Tokens that pass the head at a time.
        num_items: What the sum is divided by; None for the number of tokens that carry loss.

    Returns:
        The loss, a scalar in fp32.
    """
    wanted = labels[:, 1:]
    carries_loss = wanted != _IGNORED_LABEL
    rows, wanted = hidden[:, :-1][carries_loss], wanted[carries_loss]

    def chunk_loss(some: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(some).float(), ids, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    # Once even without a token, so that every factor has a gradient on every process.
    for start in range(0, max(1, len(wanted)), chunk):
        part = rows[start : start + chunk], wanted[start : start + chunk]
        if torch.is_grad_enabled():
            total = total + checkpoint(chunk_loss, *part, use_reentrant=False)
        else:
            total = total + chunk_loss(*part)
    if torch.is_tensor(num_items):
        num_items = num_items.to(total.device)
    return total / (len(wanted) if num_items is None else num_items)


@contextmanager
def chunked_loss(model: Any, chunk: int | None = None) -> Iterator[None]:
    """Compute the loss in chunks for the length of the block; without labels nothing changes.

    Args:
        model: A causal LM, or a PEFT model around one.
        chunk: Tokens that pass the head at a time; None for what the memory report counts with.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    inner, stack, logits_of = head_parts(model)
    plain = inner.forward
    tokens = chunk or chunk_tokens(inner.config.vocab_size)

    @wraps(plain)
    def forward(
        *args: Any, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        hidden = stack(*args, **kwargs).last_hidden_state
        loss = chunked_cross_entropy(
            hidden, labels, logits_of, chunk=tokens, num_items=num_items_in_batch
        )
        return CausalLMOutputWithPast(loss=loss)

    inner.forward = forward
    try:
        yield
    finally:
        restore_forward(model)


@dataclass(frozen=True)
class TokenScores:
    """What preference and policy losses read of each next token, shape (batch, length - 1).

    Zero where there is no label. The names are those of TRL's own fused head.

    Attributes:
        log_probs: Log-probability of the label; the one part with a gradient.
        entropy: Of the next-token distribution, in nats.
        mean_logits: Mean logit over the vocabulary.
        is_top1: Whether the label is the likeliest token.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


def token_scores(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    chunk: int,
    temperature: float = 1.0,
) -> TokenScores:
    """Score each next token that has a label, a few at a time.

    Args:
        hidden: Final hidden states, shape (batch, length, hidden).
        labels: Token ids, shape (batch, length); -100 where nothing is scored.
        logits_of: The head: (tokens, hidden) to (tokens, vocab_size).
        chunk: Tokens that pass the head at a time.
        temperature: Logits are divided by it.
    """
    wanted = labels[:, 1:]
    scored = wanted != _IGNORED_LABEL
    rows, wanted = hidden[:, :-1][scored], wanted[scored]

    def score(some: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = logits_of(some).float() / temperature
        picked = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        with torch.no_grad():
            log_all = logits.log_softmax(-1)
            entropy = -(log_all.exp() * log_all).sum(-1)
            return picked, entropy, logits.mean(-1), logits.argmax(-1) == ids

    parts = []
    # Once even without a token, so that every factor has a gradient on every process.
    for start in range(0, max(1, len(wanted)), chunk):
        part = rows[start : start + chunk], wanted[start : start + chunk]
        if torch.is_grad_enabled():
            parts.append(checkpoint(score, *part, use_reentrant=False))
        else:
            parts.append(score(*part))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenScores(*(c.new_zeros(scored.shape).masked_scatter(scored, c) for c in columns))


def install_token_scores(model: Any, *, temperature: float, chunk: int | None = None) -> None:
    """Let ``model(..., labels=..., fused_lm_head=True)`` give :class:`TokenScores`.

    It takes the place of TRL's fused head, which reads the head's weight and so passes LoRA
    factors on the head by; this one calls the module. Without ``fused_lm_head`` nothing changes.

    Args:
        model: A PEFT model around a causal LM; :func:`restore_forward` undoes it.
        temperature: Logits are divided by it.
        chunk: As in :func:`chunked_loss`.
    """
    restore_forward(model)
    inner, stack, logits_of = head_parts(model)
    plain = inner.forward
    tokens = chunk or chunk_tokens(inner.config.vocab_size)

    @wraps(plain)
    def forward(*args: Any, labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, labels=labels, **kwargs)
        hidden = stack(*args, **kwargs).last_hidden_state
        return token_scores(hidden, labels, logits_of, chunk=tokens, temperature=temperature)

    inner.forward = forward


def restore_forward(model: Any) -> None:
    """Undo :func:`install_token_scores`, and any other replacement of the model's ``forward``."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The trainer may have put a wrapper of its own around it, which goes as well.
    inner.__dict__.pop("forward", None)
    inner.__dict__.pop("_original_forward", None)


def head_parts(model: Any) -> tuple[Any, Any, Callable[[torch.Tensor], torch.Tensor]]:
    """The causal LM itself, its stack of decoder layers, and its head as a function.

    Args:
        model: A causal LM, or a PEFT model around one.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = inner.family
    stack = inner.get_submodule(family.layers.rpartition(".")[0])
    cap = getattr(inner.config, "final_logit_softcapping", None)

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        logits = inner.get_submodule(family.lm_head)(rows)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return inner, stack, logits_of
