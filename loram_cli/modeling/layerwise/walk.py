"""All windows on their way through a model of which one layer is in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from loram_cli.modeling.layerwise.states import Boundary
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.reporting import Progress

# Tokens in one forward pass of a layer: enough to keep the arithmetic busy.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of all windows at one layer boundary, of which a batch is on the device.

    Attributes:
        boundary: Where they lie, of shape (samples, length, hidden).
        starts: Index of each batch's first window; its step is the batch's size.
        device: Where layers are run.
    """

    boundary: Boundary
    starts: range
    device: str

    def read(self, start: int) -> torch.Tensor:
        """The batch that begins at a window, shape (windows, length, hidden), on the device."""
        return self.boundary.read(start, start + self.starts.step).to(self.device)

    def batches(self, progress: Progress, share: float = 1.0) -> Iterator[tuple[int, torch.Tensor]]:
        """Every batch: the index of its first window, and its hidden states."""
        for start in self.starts:
            yield start, self.read(start)
            progress.advance(share / len(self.starts))

    @torch.no_grad()
    def pass_through(
        self,
        layer: DecoderLayer,
        progress: Progress,
        share: float = 1.0,
        *,
        into: Boundary | None = None,
    ) -> "HiddenStates":
        """Hidden states after a layer."""
        after = self if into is None else replace(self, boundary=into)
        for start, hidden in self.batches(progress, share):
            after.boundary.write(start, layer(hidden))
        return after


def embedded(stream: LayerStream, windows: torch.Tensor, boundary: Boundary) -> HiddenStates:
    """Hidden states before the first layer.

    Args:
        stream: The model.
        windows: Token ids, shape (samples, length).
        boundary: Where to put them.
    """
    starts = range(0, len(windows), max(1, BATCH_TOKENS // windows.shape[1]))
    for start, hidden in stream.embed(windows, starts.step):
        boundary.write(start, hidden)
    return HiddenStates(boundary, starts, stream.device)
