"""Cross-entropy of a causal LM without its logits ever being whole in memory.

A vocabulary of 128k makes 512 KiB of fp32 logits per token, and cross-entropy's backward pass holds
them three times over. Here only tokens that carry loss pass the head, a few at a time, and their
logits are computed again in the backward pass. Loss and gradients are those of the plain
computation; with dropout on the head's LoRA factors, its mask falls differently.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from loram_cli.arch.registry import family_for
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

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_for(inner.config.to_dict(), "the model")
    stack_name = family.layers.rpartition(".")[0]
    plain = inner.forward
    cap = getattr(inner.config, "final_logit_softcapping", None)
    tokens = chunk or chunk_tokens(inner.config.vocab_size)

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        logits = inner.get_submodule(family.lm_head)(rows)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @wraps(plain)
    def forward(
        *args: Any, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        hidden = inner.get_submodule(stack_name)(*args, **kwargs).last_hidden_state
        loss = chunked_cross_entropy(
            hidden, labels, logits_of, chunk=tokens, num_items=num_items_in_batch
        )
        return CausalLMOutputWithPast(loss=loss)

    inner.forward = forward
    try:
        yield
    finally:
        # The trainer may have put a wrapper of its own around it, which goes as well.
        inner.__dict__.pop("forward", None)
        inner.__dict__.pop("_original_forward", None)
