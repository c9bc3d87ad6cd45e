"""Codes of a trellis for a group of columns, the best that a Viterbi search finds.

Which values a code may pick depends on the codes before it (:mod:`loram_cli.checkpoint.trellis`),
so that a group's codes are chosen together: of all ways to arrive at the same last codes only the
best survives. What a column's error adds to the columns that follow differs from one survivor to
the next, and each carries its own (per-survivor processing, Raheli et al., 1995).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import STEP_RATIO, STEPS, Codes, group_steps
from loram_cli.checkpoint.trellis import WINDOW, table, values_of
from loram_cli.pruning.columns import LEAST_SCALE, Columns, RowFeed
from loram_cli.pruning.sparsegpt import falling

# Steps that are tried for a group, against the spread of its weights.
_STEP_TRIES = tuple(0.7 * 1.08**i for i in range(14))
# What a step is expected to cost: a share of its square for each weight, and the square of what
# lies beyond a share of the table's largest value. On four linears of SmolLM2-135M in 2 bits the
# error of the output is 0.0072; one step of 1.2 for all groups makes it 0.0082, and the better of
# two after a search with each 0.0076.
_LOSS = {2: 0.06, 3: 0.018, 4: 0.005}
_REACH = 0.65
# A row's scale against the step of its widest group: what columns and rows feed may widen it.
_ROOM = 4.0
# Columns whose errors each survivor holds by themselves; those of earlier ones are summed.
_BLOCK_COLUMNS = 8
# Rows searched together, each with some hundred ways to go on: on a CPU as many as its cache holds.
_ROWS_TOGETHER = {"cpu": 512}
_ROWS_ON_GPU = 2048


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
            and in those after it. Several of shape (sets, columns, columns) are each for as many
            of the rows, in order. None for the identity.
        values: The table to search; None for that of the bits.

    Returns:
        uint8, shape (rows, columns).
    """
    values = (table(bits) if values is None else values).to(wanted.device)
    feed = torch.eye(wanted.shape[1], device=wanted.device) if feed is None else feed
    feeds = feed.view(-1, *feed.shape[-2:])
    together = _ROWS_TOGETHER.get(wanted.device.type, _ROWS_ON_GPU)
    rows = len(wanted) // len(feeds)
    sets = max(1, together // rows)
    # Whole sets, as many as go together; or one whose own rows may be too many.
    searches = (
        _Search(part, bits, values, some)
        for of_sets, some in zip(wanted.split(sets * rows), feeds.split(sets), strict=True)
        for part in of_sets.split(together)
    )
    return torch.cat([search.codes() for search in searches])


class _Search:
    """Survivors of all rows: one for every sequence of last codes but the oldest.

    They stand in an array of as many axes as such a sequence has codes, and the rows in its last
    one, so that each operation runs through memory in order. A new code takes the axis of the code
    that leaves: no survivor moves but along that axis, and each axis is the oldest in turn.
    """

    def __init__(
        self, wanted: torch.Tensor, bits: int, values: torch.Tensor, feed: torch.Tensor
    ) -> None:
        self._wanted = wanted.T.contiguous()
        self._columns, self._rows = self._wanted.shape
        self._choices = 2**bits
        # A value's place has one code more than a survivor.
        self._axes = (self._choices,) * (WINDOW[bits] - 1)
        self._survivors = self._choices ** len(self._axes)
        places = values.view(self._choices, *self._axes)
        self._tables = [self._turned(places, axis) for axis in range(len(self._axes))]
        self._squares = [turned.square() for turned in self._tables]
        numbers = torch.arange(self._choices, device=wanted.device, dtype=wanted.dtype)
        self._numbers = numbers.view(-1, *[1] * len(self._axes), 1)
        costs = feed.diagonal(dim1=1, dim2=2)
        self._feed = feed / costs.unsqueeze(1)
        # Of each column and row.
        self._weights = costs.square().T.repeat_interleave(self._rows // len(feed), 1)
        # Of each survivor so far; a group begins as if zeros came before it.
        self._cost = wanted.new_full((self._survivors, self._rows), torch.inf)
        self._cost[0] = 0
        self._cost = self._cost.view(*self._axes, self._rows)

    def codes(self) -> torch.Tensor:
        """Search through the columns, and back along the best way."""
        leaving: list[torch.Tensor] = []
        first = torch.arange(self._rows, device=self._wanted.device).unsqueeze(1) * self._survivors
        # What columns of earlier blocks add to those that are left, by row and survivor.
        added = self._wanted.new_zeros(self._rows * self._survivors, self._columns)
        for begin in range(0, self._columns, _BLOCK_COLUMNS):
            end = min(begin + _BLOCK_COLUMNS, self._columns)
            errors, ancestors = self._block(begin, end, added[:, : end - begin], leaving)
            if end < self._columns:
                flat = (first + ancestors.T.long()).reshape(-1)
                added = added[:, end - begin :].index_select(0, flat)
                by_survivor = errors.permute(2, 1, 0).reshape(len(self._feed), -1, end - begin)
                by_set = added.view(len(self._feed), -1, self._columns - end)
                by_set.baddbmm_(by_survivor, self._feed[:, begin:end, end:])
        return self._back(leaving)

    def _turned(self, places: torch.Tensor, axis: int) -> torch.Tensor:
        """The table where ``axis`` is the oldest: by the code that leaves, then by survivor."""
        codes = len(self._axes)
        order = [1 + (i - axis - 1) % codes for i in range(codes)]
        return places.permute(0, *order).contiguous().unsqueeze(-1)

    def _block(
        self, begin: int, end: int, added: torch.Tensor, leaving: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of one block.

        Args:
            begin: The first one.
            end: One past the last.
            added: What earlier blocks add to them, shape (rows * survivors, columns).
            leaving: Gets for each column the code that leaves, by survivor and row.

        Returns:
            The survivors' errors in them, shape (columns, survivors, rows), and the survivor of
            the block's beginning that each comes from, shape (survivors, rows).
        """
        columns, shape = end - begin, (self._survivors, self._rows)
        # What a survivor takes along: of each column what is wanted of it, and its error once it
        # is dealt with; then where the survivor came from.
        held = self._wanted.new_empty((columns + 1, *shape))
        by_column = added.view(self._rows, self._survivors, columns).permute(2, 1, 0)
        torch.add(by_column, self._wanted[begin:end, None], out=held[:columns])
        held[columns] = torch.arange(self._survivors, device=held.device).unsqueeze(1)
        held = held.view(columns + 1, *self._axes, self._rows)
        feed = self._feed[:, begin:end, begin:end].permute(1, 2, 0)
        feed = feed.repeat_interleave(self._rows // len(self._feed), 2)
        feed = feed.view(columns, columns, *[1] * len(self._axes), self._rows)
        for i in range(columns):
            column, cost = begin + i, self._weights[begin + i]
            axis = column % len(self._axes)
            values = self._tables[axis]
            # cost (wanted - value)^2 in two passes over all values.
            weighted = held[i] * cost
            so_far = torch.addcmul(self._cost, held[i], weighted)
            ways, slopes = _ways(so_far, axis), _ways(weighted, axis)
            costs = torch.addcmul(ways, slopes, values, value=-2)
            self._cost, tests = _least(costs.addcmul_(self._squares[axis], cost))
            leaving.append(_picked(self._numbers, tests).to(torch.uint8).reshape(shape))
            held = _picked(_ways(held, axis, before=1), tests)
            error = torch.sub(self._wanted[column], _picked(values, tests), out=held[i])
            held[i + 1 : columns].addcmul_(feed[i, i + 1 :], error)
        flat = held.view(columns + 1, *shape)
        return flat[:columns], flat[columns]

    def _back(self, leaving: list[torch.Tensor]) -> torch.Tensor:
        place = self._cost.view(self._survivors, self._rows).argmin(0)
        codes = torch.empty(
            (self._columns, self._rows), dtype=torch.uint8, device=self._wanted.device
        )
        for column in range(self._columns - 1, -1, -1):
            axis = column % len(self._axes)
            unit = self._choices ** (len(self._axes) - 1 - axis)
            newest = place // unit % self._choices
            codes[column] = newest
            # The survivor that it came from: the code that left in place of its newest.
            left = leaving[column].gather(0, place.unsqueeze(0))[0].long()
            place = place + (left - newest) * unit
        return codes.T.contiguous()


def _ways(survivors: torch.Tensor, axis: int, before: int = 0) -> torch.Tensor:
    """Survivors by the code that leaves, at the place of each survivor that may come from them.

    Args:
        survivors: Shape (..., *axes, rows).
        axis: That of the oldest codes.
        before: Axes before those of the codes.

    Returns:
        A view of shape (choices, ..., *axes, rows), of size 1 at ``axis``.
    """
    return survivors.movedim(before + axis, 0).unsqueeze(1 + before + axis)


def _least(costs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The least of the costs of all ways, and the way: by halves, 1 where the second is less.

    By halves, and not by ``min``, which is not vectorized on a CPU and takes twenty times as long.

    Args:
        costs: Shape (choices, *axes, rows); the choices are a power of 2.
    """
    tests = []
    while len(costs) > 1:
        tests.append((costs[1::2] < costs[0::2]).to(costs.dtype))
        costs = torch.minimum(costs[0::2], costs[1::2])
    return costs[0], tests


def _picked(ways: torch.Tensor, tests: list[torch.Tensor]) -> torch.Tensor:
    """Of each survivor's ways the one that :func:`_least` found.

    Args:
        ways: Finite, shape (choices, ..., *axes, rows).
        tests: As found.
    """
    for test in tests:
        chosen = test.view(len(test), *[1] * (ways.dim() - test.dim()), *test.shape[1:])
        # Of a weight of 0 or 1 exactly one of the two, as ``where``, which is not vectorized.
        ways = torch.lerp(ways[0::2], ways[1::2], chosen)
    return ways[0]


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
        written, rows = _Written.of(weight, low_bit), slice(0, len(weight))
        for group, block in enumerate(weight.split(low_bit.group_size, 1)):
            feed = torch.eye(block.shape[1], device=weight.device)
            fed = _Fed(group, slice(0, block.shape[1]), feed)
            written.add([_Cell(0, rows, fed)], block.unsqueeze(0))
        return written.codes()

    def round(self, weight: torch.Tensor) -> Codes:
        """Codes of rows in fp32, each group's error fed to those that follow."""
        return self._swept(weight, None)

    def round_rows(self, weight: torch.Tensor, rows: RowFeed) -> Codes:
        """Codes of blocks of rows, each block's error fed to the rows that follow.

        A group of a block waits for the groups before it and for the blocks before it. Those on
        one diagonal wait for no other of it, and are searched together: a search of a few rows
        alone takes almost as long.
        """
        return self._swept(weight, rows)

    def _swept(self, weight: torch.Tensor, rows: RowFeed | None) -> Codes:
        blocks = (slice(0, len(weight)),) if rows is None else rows.blocks
        written = _Written.of(weight, self.low_bit)
        # As the columns before a column leave it, and as only the rows before a row do.
        left = weight[:, self.order]
        by_rows = left if rows is None else left.clone()
        for diagonal in range(len(blocks) + len(self._groups) - 1):
            first = max(0, diagonal - len(self._groups) + 1)
            cells = [
                _Cell(block, blocks[block], self._groups[diagonal - block])
                for block in range(first, min(diagonal + 1, len(blocks)))
            ]
            for alike in _alike(cells):
                wanted = torch.stack([left[cell.rows, cell.fed.columns] for cell in alike])
                for cell, error in zip(alike, written.add(alike, wanted), strict=True):
                    self._pass_on(cell, error, rows, left, by_rows)
        return written.codes()

    def _pass_on(
        self,
        cell: "_Cell",
        error: torch.Tensor,
        rows: RowFeed | None,
        left: torch.Tensor,
        by_rows: torch.Tensor,
    ) -> None:
        """Feed a cell's error to its rows' later columns, and to the later rows of its columns."""
        columns = cell.fed.columns
        if rows is not None:
            # Rows make up for what a row is off altogether, what its columns made up for included.
            off = error + by_rows[cell.rows, columns] - left[cell.rows, columns]
            passed = rows.passed_on(cell.block, off)
            left[cell.rows.stop :, columns] -= passed
            by_rows[cell.rows.stop :, columns] -= passed
        after = self.upper[columns, columns.stop :]
        left[cell.rows, columns.stop :].addmm_(error @ cell.fed.feed, after, alpha=-1)

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
class _Cell:
    """A group of columns of a block of rows.

    Attributes:
        block: Which block it is of.
        rows: Its rows.
        fed: Its columns.
    """

    block: int
    rows: slice
    fed: _Fed

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, len(self.fed.feed)


def _alike(cells: list[_Cell]) -> Iterator[list[_Cell]]:
    """Cells of one shape each: the last rows and the last columns may be fewer."""
    for shape in dict.fromkeys(cell.shape for cell in cells):
        yield [cell for cell in cells if cell.shape == shape]


@dataclass(frozen=True)
class _Written:
    """A weight's codes, written cell by cell."""

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

    def add(self, cells: list[_Cell], wanted: torch.Tensor) -> torch.Tensor:
        """Choose steps and codes of cells of one shape.

        Args:
            cells: Which.
            wanted: Their weights, shape (cells, rows, columns).

        Returns:
            The error in each weight, shape as theirs.
        """
        bits, (rows, columns) = self.low_bit.bits, cells[0].shape
        feeds = torch.stack([cell.fed.feed for cell in cells])
        scale = torch.cat([self.scale[cell.rows] for cell in cells])
        costs = feeds.diagonal(dim1=1, dim2=2).square()
        index = _steps(wanted, scale.view(len(cells), rows), costs, bits)
        step = group_steps(index.view(-1, 1), scale, self.low_bit)
        codes = self.written.new_zeros(len(scale), self.low_bit.group_size)
        codes[:, :columns] = best_codes(wanted.reshape(len(scale), columns) / step, bits, feeds)
        for cell, their_codes, their_steps in zip(cells, codes.split(rows), index, strict=True):
            self.written[cell.rows, cell.fed.group] = their_codes
            self.steps[cell.rows, cell.fed.group] = their_steps
        values = values_of(codes.unsqueeze(1), bits, torch.float32)[:, 0, :columns] * step
        return wanted - values.view_as(wanted)

    def codes(self) -> Codes:
        """All of them."""
        written = self.written.reshape(len(self.scale), -1)
        return Codes(written, self.steps, torch.zeros_like(self.steps), self.scale)


def _spread(weight: torch.Tensor) -> torch.Tensor:
    """Root of the mean square of each row."""
    return weight.square().mean(-1).sqrt()


def _steps(
    wanted: torch.Tensor, scale: torch.Tensor, costs: torch.Tensor, bits: int
) -> torch.Tensor:
    """Index of the step of each row of some cells that is expected to cost least.

    A step costs what Gaussian numbers lose at it, and what weights beyond its reach lose.

    Args:
        wanted: Weights, shape (cells, rows, columns).
        scale: Of each row, shape (cells, rows).
        costs: What a squared error in each column costs, shape (cells, columns).
        bits: Of a code.

    Returns:
        uint8, shape (cells, rows).
    """
    spread, reach = _spread(wanted), _REACH * float(table(bits).abs().max())
    best = torch.full_like(spread, torch.inf)
    found = torch.zeros_like(spread)
    for share in _STEP_TRIES:
        step = spread * share
        beyond = (wanted.abs() - reach * step.unsqueeze(-1)).clamp_min_(0).square_()
        cost = beyond.add_((_LOSS[bits] * step.square()).unsqueeze(-1)) @ costs.unsqueeze(-1)
        better = cost[..., 0] < best
        best = torch.where(better, cost[..., 0], best)
        found = torch.where(better, step, found)
    ratio = (scale.float() / found.clamp_min(LEAST_SCALE)).log2() / STEP_RATIO["trellis"]
    return ratio.round_().clamp_(0, STEPS["trellis"] - 1).to(torch.uint8)
