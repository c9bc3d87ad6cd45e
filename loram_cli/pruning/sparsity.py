"""Which single weights become zero: how many, and the choice by magnitude."""

import math
from fractions import Fraction

import torch

# 2:4, the pattern that sparse tensor cores know: two zeros in every four weights of a row.
SEMI_ZEROS = 2
SEMI_GROUP = 4


def zeros_wanted(params: int, sparsity: float) -> int:
    """How many of ``params`` weights become zero at a sparsity, rounded down.

    The decimal is taken as it was written: in binary floating point 0.29 * 100 falls short of 29.
    """
    return math.floor(params * Fraction(str(sparsity)))


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of exactly the ``count`` lowest scores; ties go to the lower index.

    Args:
        scores: Not negative, any shape.
        count: How many.

    Returns:
        True where a score is among the lowest, of the shape of ``scores``.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # A partition costs one copy; sorting a large tensor would hold 64-bit indices beside it.
    values = scores.flatten().float().cpu().numpy().copy()
    values.partition(count - 1)
    threshold = float(values[count - 1])
    del values
    mask = scores < threshold
    ties = (scores == threshold).flatten().nonzero().squeeze(1)
    mask.view(-1)[ties[: count - int(mask.sum())]] = True
    return mask


def lowest_of_four(scores: torch.Tensor) -> torch.Tensor:
    """A mask of the two lowest scores in every four of a row (2:4).

    Args:
        scores: Shape (rows, columns), columns a multiple of 4.

    Returns:
        True at the lowest, of the same shape.
    """
    groups = scores.reshape(-1, SEMI_GROUP)
    # Stable, so that ties go to the lower index on every device.
    order = groups.sort(dim=1, stable=True).indices[:, :SEMI_ZEROS]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


def magnitude_mask(weight: torch.Tensor, sparsity: float, *, semi: bool) -> torch.Tensor:
    """Where a weight becomes zero by its magnitude only.

    Args:
        weight: Shape (rows, columns).
        sparsity: Share of zeros in the whole tensor.
        semi: 2:4 instead; the sparsity is then a half.
    """
    magnitudes = weight.abs()
    if semi:
        return lowest_of_four(magnitudes)
    return lowest(magnitudes, zeros_wanted(weight.numel(), sparsity))
