"""What each expert adds to its layer's output, or to the loss, one layer in memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from loram_cli.arch.experts import Experts
from loram_cli.modeling.layerwise.gradients import layer_gradients
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


def expert_taylor(
    stream: LayerStream,
    experts: Experts,
    windows: torch.Tensor,
    layers: list[int],
    pool: BoundaryPool,
    reporter: Reporter,
) -> dict[int, torch.Tensor]:
    """By how much the loss would change without each expert, to first order.

    The mean over windows of ``|dL/dg|``, where ``g`` is a gate of 1 on all that the expert adds
    within a window (Michel et al., arXiv 1905.10650, eq. 2, there for heads). No gradient of a
    weight is made: it takes the gradient of the experts' output alone.

    Args:
        stream: The base.
        experts: What the family's experts are.
        windows: Token ids, shape (samples, length).
        layers: Rising indices of layers with experts.
        pool: Keeps the hidden states; of shape (samples, length, hidden).
        reporter: Progress.

    Returns:
        Each layer's experts' scores, float64, shape (num_experts,).

    Raises:
        LoramError: The loss is not finite.
    """
    scores: dict[int, torch.Tensor] = {}
    samples, length = windows.shape

    def watch(index: int, layer: DecoderLayer) -> AbstractContextManager[None]:
        if index not in layers:
            return nullcontext()
        count = layer.module.get_parameter(experts.parameters[0]).shape[0]
        scores[index] = torch.zeros(count, dtype=torch.float64)
        return _gates_observed(layer, experts, scores[index], length)

    span = range(layers[0], layers[-1] + 1)
    for _ in layer_gradients(stream, windows, span, (), pool, reporter, watch):
        raise AssertionError("no module's gradient was asked for")
    return {i: score / samples for i, score in sorted(scores.items())}


@contextmanager
def _gates_observed(
    layer: DecoderLayer, experts: Experts, scores: torch.Tensor, length: int
) -> Iterator[None]:
    """Add to ``scores``, in place, while the layer is run and differentiated in the block."""

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        hidden, index, weights = (value.detach() for value in (*args, *kwargs.values()))

        def add(gradient: torch.Tensor) -> None:
            windows = torch.arange(len(hidden)) // length
            gates = torch.zeros(len(hidden) // length, len(scores), dtype=torch.float64)
            for slot, chosen, given in _each_slot(module, hidden, index):
                gate = weights[:, slot].double() * (given.float() * gradient.float()).sum(-1)
                gates.index_put_((windows, chosen), gate.cpu(), accumulate=True)
            scores.add_(gates.abs().sum(0))

        out.register_hook(add)

    module = layer.module.get_submodule(experts.module)
    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _each_slot(
    module: Any, hidden: torch.Tensor, index: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """One of each token's experts at a time, run by the module's own code.

    Args:
        module: That runs the experts.
        hidden: What goes into it, shape (tokens, hidden).
        index: The experts of each token, shape (tokens, top_k).

    Yields:
        The place among a token's experts; the expert there, shape (tokens,), on the CPU; and what
        it gives, shape (tokens, hidden), with a weight of 1.
    """
    for slot in range(index.shape[1]):
        chosen = index[:, slot]
        ones = torch.ones_like(chosen[:, None], dtype=hidden.dtype)
        yield slot, chosen.cpu(), type(module).forward(module, hidden, chosen[:, None], ones)


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
        for slot, chosen, out in _each_slot(module, hidden, index):
            share = weights[:, slot].double() * out.float().norm(dim=-1).double()
            self.norms.index_add_(0, chosen, share.cpu())
            self.tokens += torch.bincount(chosen, minlength=len(self.tokens))


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
