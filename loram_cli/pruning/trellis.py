"""Codes of a trellis for a group of columns, the best that a Viterbi search finds.

Which values a code may pick depends on the codes before it (:mod:`loram_cli.checkpoint.trellis`),
so that a group's codes are chosen together: of all ways to arrive at the same last codes only the
best survives. What a column's error adds to the columns that follow differs from one survivor to
the next, and each carries its own (per-survivor processing, Raheli et al., 1995).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import STEP_RATIO, STEPS, Codes, group_steps
from loram_cli.checkpoint.trellis import table, values_of
from loram_cli.pruning.columns import LEAST_SCALE, Columns
from loram_cli.pruning.sparsegpt import falling

# Steps that are tried for a group, against the spread of its weights.
_STEP_TRIES = tuple(0.7 * 1.08**i for i in range(14))
# What a step is expected to cost: a share of its square for each weight, and the square of what
# lies beyond a share of the table's largest value. On four linears of SmolLM2-135M in 2 bits the
# error of the output is 0.0072; one step of 1.2 for all groups makes it 0.0082, and the better of
# two after a search with each 0.0076.
_LOSS = {2: 0.06, 3: 0.018, 4: 0.005}
_REACH = 0.65
# A row's scale against the step of its widest group: feedback may widen it further.
_ROOM = 2.0
# Columns whose errors each survivor holds by themselves; those of earlier ones are summed.
_BLOCK_COLUMNS = 8
# Rows searched together; each holds a few hundred survivors with errors of their own.
_ROWS_TOGETHER = 2048


def best_codes(
    wanted: torch.Tensor,
    bits: int,
    feed: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    """The codes of one group of columns, for every row.

    They minimize ``|(wanted - values) feed|^2`` of each row as far as a Viterbi search can.

    Args:
        wanted: In steps, fp32, shape (rows, columns).
        bits: Of a code.
        feed: Upper triangular, shape (columns, columns): what an error in a column costs in itself
            and in those after it. None for the identity.
        values: The table to search; None for that of the bits.

    Returns:
        uint8, shape (rows, columns).
    """
    values = (table(bits) if values is None else values).to(wanted.device)
    feed = torch.eye(wanted.shape[1], device=wanted.device) if feed is None else feed
    parts = wanted.split(_ROWS_TOGETHER)
    return torch.cat([_Search(part, values, 2**bits, feed).codes() for part in parts])


class _Search:
    """Survivors of all rows: one for every sequence of last codes but the oldest."""

    def __init__(
        self, wanted: torch.Tensor, values: torch.Tensor, choices: int, feed: torch.Tensor
    ) -> None:
        self._rows, self._columns = wanted.shape
        device = wanted.device
        self._wanted, self._choices = wanted, choices
        self._survivors = values.numel() // self._choices
        self._values = values.view(self._survivors, self._choices)
        self._squares = self._values.square()
        costs = feed.diagonal()
        self._weights, self._feed = costs.square(), feed / costs
        # Of each survivor so far.
        self._cost = wanted.new_full((self._rows, self._survivors), torch.inf)
        # A group begins as if zeros came before it.
        self._cost[:, 0] = 0
        self._row = torch.arange(self._rows, device=device).unsqueeze(1)
        self._each = torch.arange(self._survivors, device=device)

    def codes(self) -> torch.Tensor:
        """Search through the columns, and back along the best way."""
        oldest: list[torch.Tensor] = []
        # What columns of earlier blocks add to each column, by survivor.
        added = self._wanted.new_zeros(self._rows * self._survivors, self._columns)
        for begin in range(0, self._columns, _BLOCK_COLUMNS):
            end = min(begin + _BLOCK_COLUMNS, self._columns)
            errors, ancestors = self._block(begin, end, added, oldest)
            flat = (self._row * self._survivors + ancestors).reshape(-1)
            added = added.index_select(0, flat)
            added[:, end:].addmm_(errors, self._feed[begin:end, end:])
        return self._back(oldest)

    def _block(
        self, begin: int, end: int, added: torch.Tensor, oldest: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of one block: the survivors' errors in them, and where each came from."""
        errors = added.new_zeros(len(added), end - begin)
        ancestors = self._each.expand(self._rows, -1)
        first = self._row * self._survivors
        for i in range(end - begin):
            column, cost = begin + i, self._weights[begin + i]
            wanted = added[:, column].index_select(0, (first + ancestors).reshape(-1))
            if i:
                wanted.addmv_(errors, self._feed_to(begin, end, column))
            wanted = wanted.view(self._rows, -1).add_(self._wanted[:, column : column + 1])
            # cost (wanted - value)^2 in two passes over all values.
            so_far = torch.addcmul(self._cost, wanted, wanted * cost).unsqueeze(-1)
            slope = (wanted * (-2 * cost)).unsqueeze(-1)
            costs = torch.addcmul(self._squares * cost, slope, self._values).add_(so_far)
            # The code that leaves the window is the highest part of a place.
            self._cost, leaving = costs.view(self._rows, self._choices, -1).min(1)
            oldest.append(leaving.to(torch.uint8))
            chosen = leaving * self._survivors + self._each
            came = chosen // self._choices
            errors = errors.index_select(0, (first + came).reshape(-1))
            picked = self._values.view(-1).index_select(0, chosen.reshape(-1))
            missed = self._wanted[:, column : column + 1] - picked.view(self._rows, -1)
            errors[:, i] = missed.view(-1)
            ancestors = ancestors.gather(1, came)
        return errors, ancestors

    def _feed_to(self, begin: int, end: int, column: int) -> torch.Tensor:
        """What errors in a block's columns add to one of them; nothing from itself or later."""
        feed = self._feed[begin:end, column].clone()
        feed[column - begin :] = 0
        return feed

    def _back(self, oldest: list[torch.Tensor]) -> torch.Tensor:
        row = self._row[:, 0]
        place = self._cost.argmin(1)
        codes = torch.empty(
            (self._rows, self._columns), dtype=torch.uint8, device=self._wanted.device
        )
        for column in range(self._columns - 1, -1, -1):
            codes[:, column] = (place % self._choices).to(torch.uint8)
            # The survivor that it came from: the code that left in front, its newest dropped.
            left = oldest[column][row, place].long()
            place = (left * self._survivors + place) // self._choices
        return codes


@dataclass(frozen=True)
class _Fed:
    """A group of columns as the sweep deals with it.

    Attributes:
        group: Which one of a row's it is.
        columns: Where its columns are in the sweep's order.
        feed: What an error in a column costs in itself and in those after it, within the group.
    """

    group: int
    columns: slice
    feed: torch.Tensor


class TrellisColumns(Columns):
    """Rounding group by group to a trellis, those groups first that cost most."""

    @staticmethod
    def order_of(costs: torch.Tensor, low_bit: LowBit) -> torch.Tensor:
        """Whole groups."""
        groups = torch.arange(len(costs), device=costs.device).split(low_bit.group_size)
        means = torch.stack([costs[group].mean() for group in groups])
        return torch.cat([groups[int(i)] for i in falling(means)])

    @staticmethod
    def nearest(weight: torch.Tensor, low_bit: LowBit) -> Codes:
        """The best codes of each group by itself."""
        written = _Written.of(weight, low_bit)
        for group, block in enumerate(weight.split(low_bit.group_size, 1)):
            written.add(group, block, torch.eye(block.shape[1], device=weight.device))
        return written.codes()

    def round(self, weight: torch.Tensor) -> Codes:
        """Codes of rows in fp32, each group's error fed to those that follow."""
        left, written = weight[:, self.order], _Written.of(weight, self.low_bit)
        for fed in self._groups:
            error = written.add(fed.group, left[:, fed.columns], fed.feed)
            end = fed.columns.stop
            left[:, end:].addmm_(error @ fed.feed, self.upper[fed.columns, end:], alpha=-1)
        return written.codes()

    @cached_property
    def _groups(self) -> tuple[_Fed, ...]:
        """In the sweep's order; each block of rows goes through them anew."""
        size, begin, found = self.low_bit.group_size, 0, []
        while begin < len(self.order):
            group = int(self.order[begin]) // size
            columns = slice(begin, begin + min(size, len(self.order) - group * size))
            found.append(_Fed(group, columns, torch.linalg.inv(self.upper[columns, columns])))
            begin = columns.stop
        return tuple(found)


@dataclass(frozen=True)
class _Written:
    """A weight's codes, written group by group."""

    low_bit: LowBit
    written: torch.Tensor
    steps: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, low_bit: LowBit) -> Self:
        """None written yet; the rows' scales are chosen."""
        groups = weight.split(low_bit.group_size, 1)
        widest = torch.stack([_spread(group) for group in groups], 1).amax(1) * max(_STEP_TRIES)
        codes = weight.new_zeros((len(weight), len(groups), low_bit.group_size), dtype=torch.uint8)
        scale = (widest * _ROOM).clamp_min(LEAST_SCALE).to(torch.float16)
        return cls(low_bit, codes, codes.new_zeros(codes.shape[:2]), scale)

    def add(self, group: int, block: torch.Tensor, feed: torch.Tensor) -> torch.Tensor:
        """Choose a group's steps and codes.

        Returns:
            The error in each weight, shape as the block's: (rows, columns).
        """
        bits, columns = self.low_bit.bits, block.shape[1]
        index = _steps(block, self.scale, feed.diagonal().square(), bits)
        step = group_steps(index.unsqueeze(1), self.scale, self.low_bit)
        self.steps[:, group] = index
        self.written[:, group, :columns] = best_codes(block / step, bits, feed)
        values = values_of(self.written[:, group : group + 1], bits, torch.float32)
        return block - values[:, 0, :columns] * step

    def codes(self) -> Codes:
        """All of them."""
        written = self.written.reshape(len(self.scale), -1)
        return Codes(written, self.steps, torch.zeros_like(self.steps), self.scale)


def _spread(weight: torch.Tensor) -> torch.Tensor:
    """Root of the mean square of each row."""
    return weight.square().mean(1).sqrt()


def _steps(
    block: torch.Tensor, scale: torch.Tensor, costs: torch.Tensor, bits: int
) -> torch.Tensor:
    """Index of the step of each row of a group that is expected to cost least.

    A step costs what Gaussian numbers lose at it, and what weights beyond its reach lose.

    Args:
        block: Weights, shape (rows, columns).
        scale: Of each row.
        costs: What a squared error in each column costs.
        bits: Of a code.
    """
    spread, reach = _spread(block), _REACH * float(table(bits).abs().max())
    best = torch.full_like(spread, torch.inf)
    found = torch.zeros_like(spread)
    for share in _STEP_TRIES:
        step = spread * share
        beyond = (block.abs() - reach * step.unsqueeze(1)).clamp_min_(0).square_()
        cost = beyond.add_((_LOSS[bits] * step.square()).unsqueeze(1)) @ costs
        better = cost < best
        best = torch.where(better, cost, best)
        found = torch.where(better, step, found)
    ratio = (scale.float() / found.clamp_min(LEAST_SCALE)).log2() / STEP_RATIO["trellis"]
    return ratio.round_().clamp_(0, STEPS["trellis"] - 1).to(torch.uint8)
