"""Hessians of a linear module's inputs."""

import torch

from loram_cli.pruning.sparsegpt import Hessian


def hessian_of(inputs: torch.Tensor) -> Hessian:
    """That of inputs, shape (tokens, columns)."""
    hessian = Hessian(inputs.shape[1], "cpu")
    hessian.add(inputs)
    return hessian
