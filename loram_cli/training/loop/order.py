"""The order in which rows are learnt: epochs without a seam, so that every batch is whole."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch.utils.data import Sampler


class EndlessOrder(Sampler[int]):
    """Epochs strung together, each shuffled by its own seed, cut into rounds of whole batches.

    A round is what the trainer calls an epoch: as many whole batches as the rows fill, at least
    one. Round ``n`` is the n-th cut of the string, so that a resumed training finds its place
    without what came before. Where the batch divides the rows, a round is an epoch.

    Args:
        rows: How many there are.
        batch: Rows of an optimizer step, all processes together.
        seed: Decides the order.
        lengths: Tokens of every row, to bring rows of like length together within a step, the
            longest ones first: what memory it takes then shows at once. Empty leaves them drawn.
            Which rows a step has is the same either way.
    """

    def __init__(self, rows: int, batch: int, seed: int, lengths: Sequence[int] = ()) -> None:
        self._rows, self._batch, self._round = rows, batch, 0
        self._lengths = lengths
        self._steps = max(1, rows // batch)

        @lru_cache(2)  # a step may end in the next epoch
        def epoch(number: int) -> list[int]:
            generator = torch.Generator().manual_seed(seed + number)
            return torch.randperm(rows, generator=generator).tolist()

        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps * self._batch

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of a round."""
        self._round = epoch

    def __iter__(self) -> Iterator[int]:
        first = self._round * self._steps
        for step in range(first, first + self._steps):
            yield from self.step(step)

    def step(self, number: int) -> list[int]:
        """The rows of an optimizer step in the order in which they pass, counted from 0."""
        first = number * self._batch
        end = first + self._batch
        found: list[int] = []
        for epoch in range(first // self._rows, -(-end // self._rows)):
            begin = epoch * self._rows
            found += self._epoch(epoch)[max(0, first - begin) : end - begin]
        if self._lengths:
            found.sort(key=lambda row: -self._lengths[row])
        return found
