"""The loss of a model on rows of tokens, without training."""

from collections.abc import Sequence
from typing import Any

import torch

from loram_cli.modeling.chunked_loss import chunked_loss
from loram_cli.training.data.tokens import IGNORED_LABEL, PadCollator, TokenRow
from loram_cli.training.loop.job import pad_token_id

# Where layers are read as they run, each batch reads all of them.
_ROWS_AT_A_TIME = 32


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[TokenRow]) -> float:
    """Mean over all tokens that carry loss, in nats."""
    device = next(model.parameters()).device
    collate = PadCollator(pad_token_id(model))
    order = sorted(rows, key=lambda row: len(row.input_ids))
    total, count = 0.0, 0
    with chunked_loss(model):
        for begin in range(0, len(order), _ROWS_AT_A_TIME):
            batch = collate(order[begin : begin + _ROWS_AT_A_TIME])
            tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            total += float(model(**batch, use_cache=False).loss) * tokens
            count += tokens
    return total / count
