"""A causal LM in three parts: what precedes its decoder layers, they themselves, what follows.

The model's own forward decides what goes into each layer (masks, rotary embeddings, scaled
embeddings) and what comes after the last one (final norm, head, capped logits). For these two the
layers inside it only record how they are called, or hand on what they are given. Nothing here
knows a family.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loram_cli.memory.setup import chunk_tokens
from loram_cli.modeling.chunked_loss import chunked_cross_entropy, head_parts


@dataclass(frozen=True)
class LayerCalls:
    """How the layers are called with hidden states of one shape, by the layer's index."""

    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, index: int, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after a layer, shape (batch, length, hidden) as before it."""
        args, kwargs = self.arguments[index]
        out = layer(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class ModelParts:
    """The parts of a causal LM, possibly with LoRA.

    Args:
        model: A causal LM, or a PEFT model around one.

    Attributes:
        layers: Its decoder layers.
        layers_name: Their full name within the causal LM.
        inner: The causal LM.
        logits_of: The head: (tokens, hidden) to (tokens, vocab_size).
        chunk: Tokens that pass the head at a time.
    """

    def __init__(self, model: Any) -> None:
        self.inner, self._stack, self.logits_of = head_parts(model)
        self.layers_name = self.inner.family.layers
        self.layers = list(self.inner.get_submodule(self.layers_name))
        self.chunk = chunk_tokens(self.inner.config.vocab_size)

    def enter(
        self, ids: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, LayerCalls]:
        """Hidden states before the first layer, and how the layers are to be called.

        Args:
            ids: Token ids, shape (batch, length), without a mask: padding stands on the right.
            positions: Of the tokens, the same shape, where a row holds several examples: they
                begin anew with each of them.
        """
        given = {} if positions is None else {"position_ids": positions}
        entered: list[torch.Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(index: int, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                entered.append(hidden_states)
            arguments.append((args, kwargs))
            return self._given_out(hidden_states)

        with torch.no_grad(), self._layers_replaced(record):
            self._stack(input_ids=ids, use_cache=False, **given)
        return entered[0], LayerCalls(tuple(arguments))

    def loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The loss from hidden states after the last layer, by final norm and head.

        Args:
            hidden: Shape (batch, length, hidden).
            labels: Token ids, shape (batch, length); -100 where there is no loss.
            num_items: As for :func:`.chunked_cross_entropy`.
        """

        def hand_on(index: int, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return self._given_out(hidden if index == len(self.layers) - 1 else hidden_states)

        # What the stack draws before its layers has been drawn when it was entered.
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._layers_replaced(hand_on):
            last = self._stack(inputs_embeds=hidden.detach(), use_cache=False).last_hidden_state
        return chunked_cross_entropy(
            last, labels, self.logits_of, chunk=self.chunk, num_items=num_items
        )

    def _given_out(self, hidden: torch.Tensor) -> Any:
        # As the stack takes it from a layer.
        return (hidden,) if self.inner.family.tuple_output else hidden

    @contextmanager
    def _layers_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        for index, layer in enumerate(self.layers):
            layer.forward = partial(forward, index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
