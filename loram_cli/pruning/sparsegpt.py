"""SparseGPT (arXiv 2301.00774): zero single weights, and let the others make up for it.

For a linear layer with inputs x, the error of an approximation is measured by the Hessian
H = sum of x x^T. Columns are dealt with from left to right; each zeroed weight's error is spread
over the columns that are not yet fixed, with the inverse of H among them, whose rows all come
from one Cholesky factor (section 3.3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loram_cli.arch.spec import Family, LinearModule
from loram_cli.errors import LoramError
from loram_cli.pruning.sparsity import SEMI_GROUP, lowest, lowest_of_four, zeros_wanted


class Hessian:
    """The sum of ``x x^T`` over all inputs of a linear module, in fp32."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        self.total = torch.zeros(columns, columns, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Count inputs, shape (..., columns)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.total.addmm_(rows.T, rows)


@dataclass(frozen=True)
class InverseFactor:
    """What the column sweep needs of a Hessian.

    Attributes:
        upper: Upper Cholesky factor of the inverse, shape (columns, columns): row i holds the
            i-th row of the inverse of H among the columns from i on, over the root of its
            diagonal.
        dead: Input features that were never anything but zero, shape (columns,).
    """

    upper: torch.Tensor
    dead: torch.Tensor


def inverse_factor(hessian: Hessian, dampening: float, where: str) -> InverseFactor:
    """Factor the inverse of a dampened Hessian; the Hessian's storage is used up.

    Args:
        hessian: Summed over the calibration text.
        dampening: Added to the diagonal, as a share of its mean.
        where: What to name in an error.

    Raises:
        LoramError: It is not finite, or not positive definite.
    """
    total = hessian.total
    diagonal = total.diagonal()
    if not diagonal.isfinite().all():
        raise LoramError(
            f"{where}: its inputs on the calibration text are not finite",
            "check the base model and the calibration text",
        )
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal.add_(dampening * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(total)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not upper.isfinite().all():
        raise LoramError(
            f"{where}: the Hessian of its inputs cannot be inverted",
            "raise --dampening, or pass more calibration text",
        )
    return InverseFactor(upper, dead)


def falling(costs: torch.Tensor) -> torch.Tensor:
    """Places by falling cost; of equal ones the first first."""
    return torch.argsort(costs, descending=True, stable=True)


def factor_in_order(
    hessian: Hessian, order: torch.Tensor, dampening: float, where: str
) -> torch.Tensor:
    """The factor of a Hessian's inverse with its columns in another order; the Hessian stays.

    Raises:
        LoramError: It is not finite, or not positive definite.
    """
    ordered = Hessian(len(order), hessian.total.device)
    ordered.total = hessian.total[order][:, order]
    return inverse_factor(ordered, dampening, where).upper


def working_bytes(inputs: Sequence[tuple[int, int]]) -> int:
    """Memory at its peak while one layer's modules are dealt with, the layer itself aside.

    All Hessians of a layer are summed in one pass, and then used up one after the other. Factoring
    holds three more matrices of that shape; the sweep holds two and the new weight.

    Args:
        inputs: For each of the layer's different inputs, in the order of the modules, its columns
            and the rows of the largest module that takes it.
    """
    peak = waiting = 0
    for columns, rows in reversed(inputs):
        square = columns * columns
        peak = max(peak, waiting + max(4 * square, 2 * square + rows * columns))
        waiting += square
    return 4 * max(peak, waiting)


def hessian_bytes(family: Family, config: Mapping[str, Any]) -> int:
    """:func:`working_bytes` of a model's widest layer.

    Modules that stand together and read the hidden state share their Hessian. Attention and MLP
    in parallel share it too, which the family does not tell: this is an upper bound for them, with
    a Hessian of each, and either used by the largest module that reads the hidden state.
    """
    peak = 0
    for layer in set(family.geometry(config).layers):
        shapes = family.layer_shapes(0, layer, config)
        inputs: list[tuple[int, int]] = []
        modules: list[tuple[LinearModule, int, int]] = []
        for module in family.layer_modules(layer):
            rows, columns = shapes[f"{family.layer_prefix(0)}{module.name}.weight"]
            modules.append((module, rows, columns))
        most = max((rows for module, rows, _ in modules if not module.columns), default=0)
        before: LinearModule | None = None
        for module, rows, columns in modules:
            if before is not None and before.columns == module.columns == ():
                continue
            inputs.append((columns, rows if module.columns else most))
            before = module
        peak = max(peak, working_bytes(inputs))
    return peak


def sparsegpt(
    weight: torch.Tensor,
    factor: InverseFactor,
    sparsity: float,
    *,
    semi: bool,
    block_columns: int = 128,
) -> torch.Tensor:
    """Zero weights, and update the rest (Algorithm 1).

    The mask is chosen block by block, ``w^2 / [H^-1]_cc^2`` being lowest over all rows of the
    block together; with 2:4, in every four columns of a row as the sweep reaches them.

    Args:
        weight: Shape (rows, columns).
        factor: Of the inputs of this module.
        sparsity: Share of zeros; the tensor has exactly that many, rounded down.
        semi: 2:4 instead.
        block_columns: Columns whose updates are held back until the block is done; a multiple of
            4 with ``semi``.

    Returns:
        The new weight in fp32.
    """
    out = weight.detach().to(torch.float32, copy=True)
    out[:, factor.dead] = 0
    rows, columns = out.shape
    zeroed = 0
    for begin in range(0, columns, block_columns):
        end = min(begin + block_columns, columns)
        block = out[:, begin:end].clone()
        inverse = factor.upper[begin:end, begin:end]
        scale = inverse.diagonal()
        errors = torch.empty_like(block)
        if semi:
            mask = torch.empty_like(block, dtype=torch.bool)
        else:
            count = zeros_wanted(rows * end, sparsity) - zeroed
            mask = lowest((block / scale).square(), count)
            zeroed += count
        for i in range(end - begin):
            if semi and i % SEMI_GROUP == 0:
                four = slice(i, i + SEMI_GROUP)
                mask[:, four] = lowest_of_four((block[:, four] / scale[four]).square())
            errors[:, i] = torch.where(mask[:, i], block[:, i], 0) / scale[i]
            # The sweep moves this column too, by the very amount that takes its weights to zero.
            block[:, i + 1 :].addr_(errors[:, i], inverse[i, i + 1 :], alpha=-1)
        block[mask] = 0
        out[:, begin:end] = block
        out[:, end:].addmm_(errors, factor.upper[begin:end, end:], alpha=-1)
    return out
