"""What rounding with error feedback needs of a module's inputs, whatever its codes stand for."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Self

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import Codes, dequantize
from loram_cli.pruning.sparsegpt import Hessian, factor_in_order

LEAST_SCALE = 6e-8
"""Of a row, so that fp16 holds it as more than zero."""


class RowFeed:
    """Blocks of rows, and what an error in one costs the rows that follow.

    Args:
        upper: Factor of the inverse of the outputs' Hessian, in the order of the rows.
        size: Rows of a block; the last one may have fewer.
    """

    def __init__(self, upper: torch.Tensor, size: int) -> None:
        rows = len(upper)
        self.blocks = tuple(slice(i, min(i + size, rows)) for i in range(0, rows, size))
        self._after = [
            torch.linalg.solve_triangular(
                upper[block, block], upper[block, block.stop :], upper=True
            )
            for block in self.blocks
        ]

    def passed_on(self, block: int, error: torch.Tensor) -> torch.Tensor:
        """What to take from the rows after a block, shape (rows after it, columns).

        Args:
            block: Which.
            error: Of its rows, shape (rows, columns).
        """
        return self._after[block].T @ error


@dataclass(frozen=True)
class Columns(ABC):
    """The columns of a weight, prepared once; it serves any rows.

    Attributes:
        costs: What an error in each column costs, shape (columns,).
        order: The columns as they are rounded.
        upper: Factor of the inverse Hessian, in that order.
        low_bit: Bits and groups.
        block_columns: Columns whose updates are held back until the block is done; on a trellis a
            block is always a group.
    """

    costs: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor
    low_bit: LowBit
    block_columns: int

    @classmethod
    def of(
        cls, hessian: Hessian, low_bit: LowBit, dampening: float, where: str, block_columns: int
    ) -> Self:
        """Prepare a Hessian, which is left as it is.

        Raises:
            LoramError: It is not finite or has no inverse.
        """
        costs = hessian.total.diagonal()
        order = cls.order_of(costs, low_bit)
        upper = factor_in_order(hessian, order, dampening, where)
        return cls(costs, order, upper, low_bit, block_columns)

    @staticmethod
    @abstractmethod
    def order_of(costs: torch.Tensor, low_bit: LowBit) -> torch.Tensor:
        """The columns as they are rounded, by what an error in each costs."""

    @staticmethod
    @abstractmethod
    def nearest(weight: torch.Tensor, low_bit: LowBit) -> Codes:
        """Codes of rows in fp32 without any feedback; needs no text."""

    @abstractmethod
    def round(self, weight: torch.Tensor) -> Codes:
        """Codes of rows in fp32, errors fed to the columns that follow."""

    def round_rows(self, weight: torch.Tensor, rows: RowFeed) -> Codes:
        """Codes of rows in fp32, errors fed to the columns that follow and to the rows that do.

        Args:
            weight: Shape (rows, columns), its rows in the order of ``rows``; changed.
            rows: Their blocks.
        """
        parts = []
        for i, block in enumerate(rows.blocks):
            part = self.round(weight[block])
            rounded = dequantize(part, self.low_bit, weight.shape[1], torch.float32)
            weight[block.stop :] -= rows.passed_on(i, weight[block] - rounded)
            parts.append(part)
        joined = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Codes)}
        return Codes(**joined)
