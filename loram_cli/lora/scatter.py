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


def scatter_experts(pair: LoraPair, kept: Sequence[int], experts: int) -> LoraPair:
    """Factors of some experts at the places of all, with zeros for the others.

    PEFT (0.21, ``ParamWrapper``) lays the experts' factors one after the other in ``lora_A``, of
    shape (experts * r, in), and side by side in ``lora_B``, of shape (out, r * experts), whose
    columns run over experts fastest.

    Args:
        pair: Factors of the kept experts.
        kept: Original index of each.
        experts: How many there are in full.

    Raises:
        ValueError: The factors are not of so many experts, or the indices do not rise.
    """
    rank, rest = divmod(pair.lora_a.shape[0], len(kept))
    if rest or pair.lora_b.shape[1] != pair.lora_a.shape[0]:
        raise ValueError(f"{pair.lora_a.shape[0]} rows are no factors of {len(kept)} experts")
    by_expert = pair.lora_a.reshape(len(kept), -1)
    lora_a = scatter_rows(by_expert, kept, experts).reshape(experts * rank, -1)
    out_features = pair.lora_b.shape[0]
    side_by_side = pair.lora_b.reshape(out_features * rank, len(kept))
    lora_b = scatter_columns(side_by_side, kept, experts).reshape(out_features, rank * experts)
    return LoraPair(lora_a, lora_b)


def add_expert_updates(
    weights: torch.Tensor,
    start: int,
    pair: LoraPair,
    scaling: float,
    experts: int,
    *,
    transposed: bool,
) -> None:
    """Add ``scaling * B @ A`` of some experts to their weights, in place.

    Args:
        weights: Of experts ``start, start + 1, ...``, shape (n, out, in), or (n, in, out).
        start: The first expert's index.
        pair: Factors of all experts; see :func:`scatter_experts`.
        scaling: alpha / r.
        experts: How many there are.
        transposed: Whether the weights have shape (n, in, out).
    """
    lora_a = pair.lora_a.reshape(experts, -1, pair.lora_a.shape[-1])
    lora_b = pair.lora_b.reshape(pair.lora_b.shape[0], -1, experts)
    for i, weight in enumerate(weights, start=start):
        one = LoraPair(lora_a[i], lora_b[..., i])
        if transposed:
            one = LoraPair(one.lora_b.T, one.lora_a.T)
        add_update(weight, 0, one, scaling)


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
