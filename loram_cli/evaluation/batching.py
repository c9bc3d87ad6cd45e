"""Batches that grow while memory allows and halve when it does not."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from loram_cli.errors import LoramError, is_out_of_memory
from loram_cli.modeling.free_memory import free_memory_bytes

T = TypeVar("T")
R = TypeVar("R")
_FIRST_ROWS = 8
_MOST_ROWS = {"cpu": 128, "cuda": 1024}
_SUCCESSES_BEFORE_REGROWTH = 4
_SPARE_SHARE = {"cpu": 0.5, "cuda": 0.85}


class GrowingBatch:
    """Chooses how many rows go into one pass.

    With a number given that is the most; without, the batch starts at 8 rows, or as many as fit,
    and doubles while the estimate of the next one fits into half of the free memory (85% on a
    GPU). Either way an out-of-memory error halves it, and the rows are tried again.

    One token of one row takes at most ``bytes_per_token`` of memory while a pass runs.
    """

    def __init__(self, rows: int | None, device: torch.device, bytes_per_token: int) -> None:
        self._device = device
        self._bytes_per_token = bytes_per_token
        self._most = rows or _MOST_ROWS.get(device.type, _MOST_ROWS["cpu"])
        self._adapts = rows is None
        self.rows = rows or _FIRST_ROWS
        self._ceiling = self._most
        self._successes = 0

    def run(
        self,
        items: Sequence[T],
        tokens: Callable[[T], int],
        work: Callable[[Sequence[T]], R],
    ) -> Iterator[R]:
        """What ``work`` gives for slices of the items, until all are done.

        Args:
            items: Longest first: a batch that is too large fails at once.
            tokens: Tokens of an item, with those that it generates.
            work: One pass, which leaves nothing behind when it fails.

        Raises:
            LoramError: A single item does not fit.
        """
        if items and self._adapts:
            row_bytes = tokens(items[0]) * self._bytes_per_token
            self.rows = max(1, min(self.rows, _spare_bytes(self._device) // row_bytes))
        position = 0
        while position < len(items):
            batch = items[position : position + self.rows]
            try:
                result = work(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise LoramError(
                        f"out of memory on one row of {tokens(batch[0])} tokens",
                        "shorten it (--num-fewshot, --max-new-tokens), leave less to the weights "
                        "(--weights-memory), or use another --device",
                    ) from error
                self.rows = self._ceiling = len(batch) // 2
                self._successes = 0
                # The traceback holds the failed pass's tensors.
                error.__traceback__ = None
                _release(self._device)
                continue
            position += len(batch)
            if position < len(items):
                self._grow(tokens(items[position]))
            yield result

    def _grow(self, tokens: int) -> None:
        self._successes += 1
        if self._successes % _SUCCESSES_BEFORE_REGROWTH == 0:
            self._ceiling = min(self._most, self._ceiling * 2)
        wanted = min(self.rows * 2, self._ceiling)
        if not self._adapts or wanted * tokens * self._bytes_per_token <= _spare_bytes(
            self._device
        ):
            self.rows = wanted


def bytes_per_token(model: Any, *, scoring: bool) -> int:
    """What a token of a row takes at most: its keys and values, activations, and logits.

    Scoring keeps the logits of every position.
    """
    config = model.config
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = getattr(config, "num_hidden_layers", 1)
    element_bytes = torch.finfo(model.dtype).bits // 8 if model.dtype.is_floating_point else 2
    widest = max(getattr(config, "intermediate_size", 0) or 0, config.hidden_size)
    values = 2 * layers * kv_heads * head_dim + 4 * widest + 8 * config.hidden_size
    if scoring:
        return values * element_bytes + config.vocab_size * (element_bytes + 8)
    return values * element_bytes


def _spare_bytes(device: torch.device) -> int:
    return int(_SPARE_SHARE.get(device.type, _SPARE_SHARE["cpu"]) * free_memory_bytes(device))


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
