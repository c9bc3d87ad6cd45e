"""How much each expert adds to its layer's output, over calibration text, one layer in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loram_cli.arch.experts import Experts
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.modeling.layerwise.walk import embedded
from loram_cli.pruning.experts import ExpertImportance
from loram_cli.reporting import Reporter


def expert_scores(
    stream: LayerStream,
    experts: Experts,
    windows: torch.Tensor,
    layers: list[int],
    importance: ExpertImportance,
    pool: BoundaryPool,
    reporter: Reporter,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Score the experts of some layers.

    Args:
        stream: The base.
        experts: What the family's experts are.
        windows: Token ids, shape (samples, length).
        layers: Rising indices of layers with experts.
        importance: ``reap``: the mean over an expert's tokens of its weight times the norm of its
            output (arXiv 2510.13999, eq. 9); ``frequency``: how many tokens it has.
        pool: Keeps the hidden states; of shape (samples, length, hidden).
        reporter: Progress.

    Yields:
        Each layer's index and its experts' scores, float64, shape (num_experts,).
    """
    with reporter.progress("score experts", layers[-1] + 1, "layer") as progress:
        states = embedded(stream, windows, pool.new())
        for i in range(layers[-1] + 1):
            with stream.layer(i) as layer:
                if i not in layers:
                    states = states.pass_through(layer, progress)
                    continue
                with _observed(layer, experts) as tally:
                    states = states.pass_through(layer, progress)
            yield i, tally.scores(importance)
        pool.release(states.boundary)


class _Tally:
    """Sums over the tokens of each expert."""

    def __init__(self, num_experts: int) -> None:
        self.tokens = torch.zeros(num_experts, dtype=torch.float64)
        self.norms = torch.zeros(num_experts, dtype=torch.float64)

    def scores(self, importance: ExpertImportance) -> torch.Tensor:
        if importance == "frequency":
            return self.tokens
        # What no token reached adds nothing.
        return self.norms / self.tokens.clamp_min(1)

    @torch.no_grad()
    def add(
        self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Count a batch; one of each token's experts at a time is run, by the module's own code."""
        ones = torch.ones_like(weights[:, :1])
        for slot in range(index.shape[1]):
            chosen = index[:, slot]
            out = type(module).forward(module, hidden, chosen[:, None], ones)
            share = weights[:, slot].double() * out.float().norm(dim=-1).double()
            self.norms.index_add_(0, chosen.cpu(), share.cpu())
            self.tokens += torch.bincount(chosen.cpu(), minlength=len(self.tokens))


@contextmanager
def _observed(layer: DecoderLayer, experts: Experts) -> Iterator[_Tally]:
    """What a layer's experts are given while it is run in the block."""
    module = layer.module.get_submodule(experts.module)
    tally = _Tally(layer.module.get_parameter(experts.parameters[0]).shape[0])

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, index, weights = (*args, *kwargs.values())
        tally.add(module, hidden, index, weights)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield tally
    finally:
        handle.remove()
