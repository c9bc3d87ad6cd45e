"""The order in which rows are learnt: epochs without a seam, so that every batch is whole."""

from collections.abc import Iterator

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
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self._rows, self._seed, self._round = rows, seed, 0
        self._length = max(1, rows // batch) * batch

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of a round."""
        self._round = epoch

    def __iter__(self) -> Iterator[int]:
        first = self._round * self._length
        end = first + self._length
        for epoch in range(first // self._rows, -(-end // self._rows)):
            begin = epoch * self._rows
            generator = torch.Generator().manual_seed(self._seed + epoch)
            order = torch.randperm(self._rows, generator=generator).tolist()
            yield from order[max(0, first - begin) : end - begin]
