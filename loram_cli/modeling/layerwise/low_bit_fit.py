"""Fit each layer of few bits to what the full layer gives, one layer of each in memory.

As :mod:`.layer_fit` follows both models, and with its targets: the full model's hidden states on
its own trajectory, so that a layer also makes up for what those before it got wrong. There is no
closed form for codes; gradient steps move codes, steps, zeros, scales, norms and biases together
(EfficientQAT's block-wise phase, arXiv 2407.11062), each token's error against its own size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import weight_of
from loram_cli.modeling.layerwise.block_steps import BlockSteps, take_block_steps
from loram_cli.modeling.layerwise.layer_fit import LayerFit
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.modeling.layerwise.walk import HiddenStates, embedded
from loram_cli.modeling.low_bit_training import TrainedLowBitLinear, make_trained
from loram_cli.reporting import Progress, Reporter

Packed = Callable[[str], torch.Tensor]
"""The bytes of a weight by its tensor's name."""


@dataclass(frozen=True)
class LowBitFit:
    """How to fit.

    Attributes:
        low_bit: How the linears are rounded.
        stored: Type of the checkpoint's other tensors.
        steps: Gradient steps on each layer.
        targets: What the full layer is run on: the full model's own hidden states, or the small
            model's.
    """

    low_bit: LowBit
    stored: torch.dtype
    steps: BlockSteps
    targets: Literal["full", "local"] = "full"


def fit_low_bit_layers(
    full: LayerStream,
    small: LayerStream,
    windows: torch.Tensor,
    packed: Packed,
    known: Callable[[int], LayerFit | None],
    pools: tuple[BoundaryPool, BoundaryPool],
    reporter: Reporter,
    how: LowBitFit,
) -> Iterator[tuple[int, LayerFit]]:
    """Fit all layers, first to last.

    Args:
        full: The base.
        small: The model of few bits.
        windows: Token ids, shape (samples, length).
        packed: Reads the bytes of a weight.
        known: The fit of a layer that was fitted before, else None.
        pools: Keep the hidden states of the base and of the small model.
        reporter: Progress.
        how: Rounding, gradient steps and targets.

    Yields:
        Each layer's index and fit; its weights are bytes.

    Raises:
        LoramError: An error is not finite.
    """
    modules = [module.name for module in small.family.modules]
    with reporter.progress("reconstruct", small.num_layers, "layer") as progress:
        theirs = embedded(full, windows, pools[0].new())
        mine = embedded(small, windows, pools[1].new())
        for i in range(small.num_layers):
            with full.layer(i) as whole, small.layer(i) as narrow:
                pair = _Pair(whole, narrow, theirs, mine, progress, how.targets)
                names = narrow.present(modules)
                fit = known(i)
                if fit is None:
                    fit = _fit(pair, names, packed, how, seed=i)
                else:
                    _put(narrow, fit.weights, names, how.low_bit)
                    pair.advance(1.0)
                progress.detail(f"error {fit.error_before:.3f} -> {fit.error_after:.3f}")
                yield i, fit
        pools[0].release(theirs.boundary)
        pools[1].release(mine.boundary)


class _Pair:
    """One layer of both models, and the hidden states before it."""

    def __init__(
        self,
        whole: DecoderLayer,
        narrow: DecoderLayer,
        theirs: HiddenStates,
        mine: HiddenStates,
        progress: Progress,
        targets: str,
    ) -> None:
        self.whole, self.narrow = whole, narrow
        self._theirs, self.mine = theirs, mine
        self.progress, self._targets = progress, targets

    @torch.no_grad()
    def draw(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of a batch, and what the full layer makes of its own or of the same."""
        hidden = self.mine.read(start)
        wanted = hidden if self._targets == "local" else self._theirs.read(start)
        return hidden, self.whole(wanted)

    @torch.no_grad()
    def error(self, share: float) -> float:
        """The layer's relative squared error, averaged over tokens."""
        return self._pass(share, keep=False)

    @torch.no_grad()
    def advance(self, share: float) -> float:
        """Take both models' hidden states past the layer; the error as :meth:`error`."""
        return self._pass(share, keep=True)

    def _pass(self, share: float, *, keep: bool) -> float:
        total, tokens = 0.0, 0
        for start, hidden in self.mine.batches(self.progress, share):
            out, goal = self.narrow(hidden), self.whole(self._theirs.read(start))
            wanted = (self.whole(hidden) if self._targets == "local" else goal).float()
            missed = (out.float() - wanted).square().mean(-1) / wanted.square().mean(-1)
            total, tokens = total + float(missed.sum()), tokens + missed.numel()
            if keep:
                self._theirs.boundary.write(start, goal)
                self.mine.boundary.write(start, out)
        return total / tokens


def _fit(pair: _Pair, names: list[str], packed: Packed, how: LowBitFit, *, seed: int) -> LayerFit:
    """Fit one layer, and take both models' hidden states past it."""
    narrow, steps, low_bit = pair.narrow, how.steps, how.low_bit
    before = pair.error(0.1)
    plain = {name: narrow.module.get_submodule(name) for name in names}
    rows = {name: packed(f"{narrow.prefix}{name}.weight") for name in names}
    device = next(narrow.module.parameters()).device
    trained = make_trained(narrow.module, names, rows, low_bit, device)
    starts = pair.mine.starts

    def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair.progress.advance(0.8 / steps.count)
        return pair.draw(starts[batch])

    try:
        take_block_steps(narrow, draw, len(starts), steps, seed=seed)
        weights = _as_stored(narrow, trained, how.stored)
    finally:
        for name, linear in plain.items():
            owner, _, attribute = name.rpartition(".")
            setattr(narrow.module.get_submodule(owner), attribute, linear)
    _put(narrow, weights, names, low_bit)
    return LayerFit(weights, before, pair.advance(0.1))


def _as_stored(
    layer: DecoderLayer, trained: dict[str, TrainedLowBitLinear], stored: torch.dtype
) -> dict[str, torch.Tensor]:
    """A fitted layer's tensors as the checkpoint will have them."""
    found = {f"{layer.prefix}{name}.weight": linear.packed() for name, linear in trained.items()}
    moved = {id(p) for linear in trained.values() for p in linear.own_parameters()}
    for name, parameter in layer.module.named_parameters():
        if id(parameter) not in moved:
            found[layer.prefix + name] = parameter.data.to(stored, copy=True)
    return {name: tensor.cpu() for name, tensor in found.items()}


def _put(
    layer: DecoderLayer, weights: dict[str, torch.Tensor], names: list[str], low_bit: LowBit
) -> None:
    """A layer's tensors from their stored form; weights of few bits become floating ones."""
    linears = {f"{name}.weight" for name in names}
    for full_name, tensor in weights.items():
        name = full_name.removeprefix(layer.prefix)
        parameter = layer.module.get_parameter(name)
        if name in linears:
            tensor = weight_of(tensor, low_bit, parameter.shape[1], parameter.dtype)
        parameter.data.copy_(tensor)
