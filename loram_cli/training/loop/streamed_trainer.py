"""The trainer of a model whose layers come and go: all micro-batches pass each one together."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from loram_cli.modeling.layerwise.lora_pass import LoraPass, loss_tokens
from loram_cli.training.data.tokens import TokenRow
from loram_cli.training.loop.trainer import StepTrainer


class StreamedTrainer(StepTrainer):
    """A trainer whose losses and gradients a :class:`.LoraPass` computes.

    Order of data, clipping, optimizer, schedule, checkpoints and logs are the parent's. It asks
    for micro-batches one by one; at the first one of a step the gradients of all are computed.
    """

    def __init__(self, *args: Any, streamed: LoraPass, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._streamed = streamed
        self._batches: list[dict[str, torch.Tensor]] = []
        self._losses: deque[torch.Tensor] = deque()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The parent's: the micro-batches of the next step, and how many tokens carry loss."""
        self._batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._losses.clear()
        return self._batches, num_items

    def training_step(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of the next micro-batch; its gradients are there since the step's first."""
        if not self._losses:
            batches = [self._prepare_inputs(batch) for batch in self._batches]
            losses = self._streamed.accumulate(
                batches,
                num_items_in_batch,
                autocast=self.accelerator.autocast,
                backward=self.accelerator.backward,
            )
            self._losses.extend(losses)
        return self._losses.popleft()

    def _batch_losses(self, batches: Iterable[list[TokenRow]]) -> Iterator[tuple[float, int]]:
        # As many at a time as take no more memory than a training step does.
        together = self.args.gradient_accumulation_steps * self._streamed.boundaries
        rest = iter(batches)
        while some := [self._collated(rows) for rows in islice(rest, together)]:
            losses = self._streamed.losses(some, autocast=self.accelerator.autocast)
            yield from zip(losses, loss_tokens(some), strict=True)
