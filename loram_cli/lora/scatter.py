"""LoRA factors of a pruned model at the full model's shapes (paper, section 3.2, R(.)).

``delta = B @ A`` with B of shape (out, r) and A of shape (r, in). Pruning kept some rows of the
weight (output features) and some columns (input features); rows of B and columns of A go back to
the original indices, and everything else is zero, so that the full delta equals the small one
where weights were kept and is zero elsewhere.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from loram_cli.lora.adapter import LoraPair


def scatter_rows(factor: torch.Tensor, rows: Sequence[int], full_rows: int) -> torch.Tensor:
    """Put the rows of ``lora_B`` back.

    Args:
        factor: Shape (len(rows), r).
        rows: Original index of each row.
        full_rows: Output features of the full weight.

    Returns:
        Shape (full_rows, r).

    Raises:
        ValueError: The number of rows does not match, or the indices do not rise within the full
            weight: a negative one would count from the end, and of two equal ones one be lost.
    """
    if factor.shape[0] != len(rows):
        raise ValueError(f"{factor.shape[0]} rows, {len(rows)} kept indices")
    if rows and (rows[0] < 0 or rows[-1] >= full_rows or any(a >= b for a, b in pairwise(rows))):
        raise ValueError(f"the kept indices do not rise from 0 to below {full_rows}")
    full = factor.new_zeros((full_rows, factor.shape[1]))
    full[torch.tensor(rows, dtype=torch.long)] = factor
    return full


def scatter_columns(
    factor: torch.Tensor, columns: Sequence[int], full_columns: int
) -> torch.Tensor:
    """Put the columns of ``lora_A`` back.

    Args:
        factor: Shape (r, len(columns)).
        columns: Original index of each column.
        full_columns: Input features of the full weight.

    Returns:
        Shape (r, full_columns).

    Raises:
        ValueError: As :func:`scatter_rows`, of columns.
    """
    return scatter_rows(factor.T, columns, full_columns).T.contiguous()


def gather(
    full: torch.Tensor, rows: Sequence[int] | None, columns: Sequence[int] | None
) -> torch.Tensor:
    """The kept part of a full delta: what recovery must leave equal to the small delta."""
    if rows is not None:
        full = full[torch.tensor(rows, dtype=torch.long)]
    if columns is not None:
        full = full[:, torch.tensor(columns, dtype=torch.long)]
    return full


def add_update(weight: torch.Tensor, start: int, pair: LoraPair, scaling: float) -> None:
    """Add some rows of ``scaling * B @ A`` to the same rows of the weight, in place.

    The sum is taken in float32 (float64 for a float64 weight) and rounded to the weight's type
    once.

    Args:
        weight: Rows ``start, start + 1, ...`` of the full weight, shape (n, in).
        start: The first row's index.
        pair: Factors at the full shapes.
        scaling: alpha / r.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    lora_b = pair.lora_b[start : start + weight.shape[0]].to(wide)
    weight.copy_(weight.to(wide).addmm_(lora_b, pair.lora_a.to(wide), alpha=scaling))
