"""Zeros that stay zeros: the mask of a model whose single weights were pruned.

The zeros in the weights are the mask, so it needs no memory of its own and comes back with any
checkpoint. A weight that is zero gets no gradient; Adam's moments of it then stay zero, its step is
zero and weight decay keeps it where it is. Clipping also sees the gradient of live weights only.
"""

from collections.abc import Iterable
from typing import Any

import torch

from loram_cli.errors import LoramError


def keep_zeros(model: Any, names: Iterable[str]) -> list[Any]:
    """Keep the zeros of some weights through training by gradient.

    Returns:
        Handles of the hooks, to be removed when training is done.
    """
    parameters = dict(model.named_parameters())

    def mask_gradient(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.masked_fill_(parameter == 0, 0)

    return [
        parameters[name].register_post_accumulate_grad_hook(mask_gradient)
        for name in names
        if parameters[name].requires_grad
    ]


def check_zeros(name: str, before: torch.Tensor, after: torch.Tensor) -> int:
    """Count the zeros of a trained weight, once it is sure that none was lost.

    Raises:
        LoramError: A weight that was zero is not any more.
    """
    lost = int(((before == 0) & (after.cpu() != 0)).sum())
    if lost:
        raise LoramError(f"tensor {name}: {lost} pruned weights are no longer zero after training")
    return int((after == 0).sum())
