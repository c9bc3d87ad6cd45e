"""Fit each pruned layer to what the full layer gives, one layer of each in memory.

Both models are followed layer by layer over calibration text, each on its own hidden states. In a
pruned layer the modules whose inputs were cut (attention output, MLP output) are refitted in
order by ridge least squares, each on what reaches it after the refits before it.

What is fitted to: the full model's hidden states on *its own* trajectory. In a layer of the form
``h + attention(h)``, then ``h + mlp(h)``, the wanted output of such a module is whatever takes
the pruned model's residual stream to the full model's, so that it also makes up for what earlier
layers got wrong. Layers of another form (a norm after the module, as in Gemma 2) are told by
their sums not adding up; there the wanted output is the full model's own output of that module.
Fitting to the full layer on the pruned model's inputs instead is ``targets="local"``.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from loram_cli.modeling.layerwise.block_steps import BlockSteps, take_block_steps
from loram_cli.modeling.layerwise.states import Boundary, BoundaryPool
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.modeling.layerwise.walk import HiddenStates, embedded
from loram_cli.pruning.least_squares import NormalEquations
from loram_cli.reporting import Progress, Reporter

# Of the layer's output; sums in bf16 miss by a few thousandths.
_ADDS_UP = 0.05

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """How to fit.

    Attributes:
        stored: Type of the pruned checkpoint's tensors.
        ridge: See :meth:`NormalEquations.solve`; 0 needs more tokens than a module has inputs.
        targets: What the full layer is run on: the full model's own hidden states, or the pruned
            model's.
        steps: Gradient steps on all parameters of each layer, after the closed form; or None.
        expert_steps: The same on layers that lost experts, where ``steps`` is None.
    """

    stored: torch.dtype
    ridge: float
    targets: Literal["full", "local"] = "full"
    steps: BlockSteps | None = None
    expert_steps: BlockSteps | None = None


@dataclass(frozen=True)
class LayerFit:
    """What was done to one pruned layer.

    Attributes:
        weights: Fitted tensors by full name, in the pruned checkpoint's own type, on the CPU.
        error_before: ``|pruned - wanted|^2 / |wanted|^2`` of the layer's output as it was pruned,
            on the inputs that the fitted layers before it give.
        error_after: The same after the fit.
    """

    weights: Weights
    error_before: float
    error_after: float


@dataclass(frozen=True)
class _Trace:
    """One run of a layer: its output, and input and output of the modules to fit, in order."""

    out: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    def stream(self, hidden: torch.Tensor, module: int) -> torch.Tensor:
        """The stream to which the module's output is added, in fp32."""
        return hidden.float() + sum(out.float() for out in self.outputs[:module])

    def adds_up(self, hidden: torch.Tensor) -> bool:
        """Whether the layer only adds its modules' outputs to the stream."""
        total = self.stream(hidden, len(self.outputs))
        return bool((total - self.out).norm() <= _ADDS_UP * (self.out - hidden).float().norm())


def reconstruct_layers(
    full: LayerStream,
    small: LayerStream,
    windows: torch.Tensor,
    pruned: Collection[int],
    known: Callable[[int], LayerFit | None],
    pools: tuple[BoundaryPool, BoundaryPool],
    reporter: Reporter,
    how: Reconstruction,
) -> Iterator[tuple[int, LayerFit]]:
    """Fit the pruned layers, first to last; the layers after the last one are not run.

    Args:
        full: The base.
        small: The pruned model.
        windows: Token ids, shape (samples, length).
        pruned: The pruned layers' indices.
        known: The fit of a layer that was fitted before, else None.
        pools: Keep the hidden states of the base and of the pruned model.
        reporter: Progress.
        how: Ridge, targets and gradient steps.

    Yields:
        Each pruned layer's index and fit.

    Raises:
        LoramError: Activations are not finite, or too little text for the ridge.
    """
    last = max(pruned)
    with reporter.progress("reconstruct", last + 1, "layer") as progress:
        run = _Run(full, how, pools[0], progress)
        pair = _Pair(
            embedded(full, windows, pools[0].new()), embedded(small, windows, pools[1].new())
        )
        for i in range(last + 1):
            with full.layer(i) as whole, small.layer(i) as narrow:
                if i not in pruned:
                    run.advance(whole, narrow, pair)
                else:
                    fit = run.fit(whole, narrow, pair, known(i), i)
                    progress.detail(f"error {fit.error_before:.3f} -> {fit.error_after:.3f}")
                    yield i, fit
        pools[0].release(pair.full.boundary)
        pools[1].release(pair.small.boundary)


@dataclass(frozen=True)
class _Pair:
    """Hidden states of both models at the layer boundary under way."""

    full: HiddenStates
    small: HiddenStates


@dataclass(frozen=True)
class _Goal:
    """What the full layer gives on one batch.

    Attributes:
        before: What went into it.
        outputs: Of its modules, in order.
        out: Its own output.
        adds_up: Whether it only adds its modules' outputs to the stream.
    """

    before: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    out: torch.Tensor
    adds_up: bool

    def wanted(self, position: int, stream: torch.Tensor) -> torch.Tensor:
        """The output that a module of the pruned layer should have, in fp32.

        Args:
            position: Of the module.
            stream: To which the pruned layer adds it.
        """
        wanted = self.outputs[position].float()
        if self.adds_up:
            mine = self.before.float() + sum(out.float() for out in self.outputs[:position])
            wanted = wanted + mine - stream
        return wanted


class _Goals:
    """What the full layer gives on the whole text: it is run once, and read as often as needed.

    Args:
        trace: Runs the layer on a batch.
        theirs: What goes into the full layer, by the batch's first window.
        pool: Keeps what it gives, where the modules' outputs have the hidden states' shape.
    """

    def __init__(
        self,
        trace: Callable[[torch.Tensor], _Trace],
        theirs: Callable[[int], torch.Tensor],
        pool: BoundaryPool,
    ) -> None:
        self._trace, self._theirs, self._pool = trace, theirs, pool
        self._kept: list[Boundary] = []
        self._adds_up: dict[int, bool] = {}

    def make(self, start: int) -> _Goal:
        """Run the layer on a batch for the first time, and keep what it gives."""
        before = self._theirs(start)
        traced = self._trace(before)
        self._adds_up[start] = traced.adds_up(before)
        tensors = (*traced.outputs, traced.out)
        if not self._kept:
            self._kept = [self._pool.new() for _ in tensors]
        for boundary, tensor in zip(self._kept, tensors, strict=True):
            boundary.write(start, tensor)
        return _Goal(before, traced.outputs, traced.out, self._adds_up[start])

    def read(self, start: int) -> _Goal:
        """What the layer gave on a batch."""
        before = self._theirs(start)
        stop = start + len(before)
        *outputs, out = (kept.read(start, stop).to(before.device) for kept in self._kept)
        return _Goal(before, tuple(outputs), out, self._adds_up[start])

    def close(self) -> None:
        """Drop what is kept."""
        for boundary in self._kept:
            self._pool.release(boundary)


class _Run:
    """What stays the same from layer to layer."""

    def __init__(
        self, full: LayerStream, how: Reconstruction, pool: BoundaryPool, progress: Progress
    ) -> None:
        # What adds to the stream; a latent's second projection has rows of its own.
        modules = full.family.modules
        self._candidates = [m.name for m in modules if m.columns and not m.rows]
        self._modules: list[str] = []
        self._experts = full.family.experts
        self._how = how
        self._pool = pool
        self._progress = progress

    def fit(
        self, whole: DecoderLayer, narrow: DecoderLayer, pair: _Pair, known: LayerFit | None,
        index: int,
    ) -> LayerFit:  # fmt: skip
        """Fit one layer, and take both models' hidden states past it."""
        self._modules = whole.present(self._candidates)
        if known is not None:
            for name, weight in known.weights.items():
                narrow.module.get_parameter(name.removeprefix(narrow.prefix)).data.copy_(weight)
            self.advance(whole, narrow, pair)
            return known

        def theirs(start: int) -> torch.Tensor:
            states = pair.small if self._how.targets == "local" else pair.full
            return states.read(start)

        goals = _Goals(lambda hidden: self._trace(whole, hidden), theirs, self._pool)
        try:
            fewer_experts = self._lost_experts(whole, narrow)
            return self._fit(narrow, pair, goals, index, fewer_experts=fewer_experts)
        finally:
            goals.close()

    def _fit(
        self, narrow: DecoderLayer, pair: _Pair, goals: _Goals, index: int, *, fewer_experts: bool
    ) -> LayerFit:
        steps = self._how.steps
        if steps is None and fewer_experts:
            steps = self._how.expert_steps
        # Over the text: one for each module, one for the gradient steps, one to go on.
        passes = len(self._modules) + (steps is not None) * (1 + fewer_experts) + 1
        errors = [
            self._refit(narrow, pair, goals, position, passes)
            for position in range(len(self._modules))
        ]
        if steps is not None:
            starts = pair.small.starts

            def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
                self._progress.advance(1 / passes / steps.count)
                return pair.small.read(starts[batch]), goals.read(starts[batch]).out

            kept = narrow.module.parameters() if fewer_experts else ()
            before = [parameter.detach().clone() for parameter in kept]
            take_block_steps(narrow, draw, len(starts), steps, seed=index)
            if fewer_experts and self._error(narrow, pair, goals, passes) > errors[0]:
                # A few tokens an expert can mislead it: then the layer stays as it was.
                for parameter, old in zip(narrow.module.parameters(), before, strict=True):
                    parameter.data.copy_(old)
            del before
        names = [f"{name}.weight" for name in self._modules]
        if steps is not None:
            names = [name for name, _ in narrow.module.named_parameters()]
        stored = {}
        for name in names:
            parameter = narrow.module.get_parameter(name)
            # Rounded as the checkpoint will be, so that later layers make up for the rounding.
            stored[narrow.prefix + name] = parameter.data.to("cpu", self._how.stored, copy=True)
            parameter.data.copy_(stored[narrow.prefix + name])
        return LayerFit(stored, errors[0], self._go_on(narrow, pair, goals, passes))

    def _lost_experts(self, whole: DecoderLayer, narrow: DecoderLayer) -> bool:
        """Whether the pruned layer has fewer experts than the full one."""
        if self._experts is None:
            return False
        shapes = [dict(layer.module.named_parameters()) for layer in (whole, narrow)]
        return any(
            name in shapes[0] and shapes[0][name].shape != shapes[1][name].shape
            for name in self._experts.parameters
        )

    @torch.no_grad()
    def _error(self, narrow: DecoderLayer, pair: _Pair, goals: _Goals, passes: int) -> float:
        """The layer's relative squared error as it is; the hidden states stay."""
        error = _Error()
        for start, mine in pair.small.batches(self._progress, 1 / passes):
            error.add(narrow(mine), goals.read(start).out)
        return error.value

    @torch.no_grad()
    def advance(self, whole: DecoderLayer, narrow: DecoderLayer, pair: _Pair) -> None:
        """Replace hidden states by those after a layer that is not fitted."""
        for start, mine in pair.small.batches(self._progress):
            if self._how.targets == "full":
                pair.full.boundary.write(start, whole(pair.full.read(start)))
            pair.small.boundary.write(start, narrow(mine))

    @torch.no_grad()
    def _go_on(self, narrow: DecoderLayer, pair: _Pair, goals: _Goals, passes: int) -> float:
        """Replace hidden states by those after a fitted layer; their relative squared error."""
        error = _Error()
        for start, mine in pair.small.batches(self._progress, 1 / passes):
            out, goal = narrow(mine), goals.read(start).out
            error.add(out, goal)
            if self._how.targets == "full":
                pair.full.boundary.write(start, goal)
            pair.small.boundary.write(start, out)
        return error.value

    @torch.no_grad()
    def _refit(
        self, narrow: DecoderLayer, pair: _Pair, goals: _Goals, position: int, passes: int
    ) -> float:
        """Closed form for one module of the layer; the layer's error before it."""
        module = narrow.module.get_submodule(self._modules[position])
        equations = NormalEquations(module.weight)
        error = _Error()
        for start, mine in pair.small.batches(self._progress, 1 / passes):
            goal = goals.make(start) if position == 0 else goals.read(start)
            traced = self._trace(narrow, mine)
            error.add(traced.out, goal.out)
            wanted = goal.wanted(position, traced.stream(mine, position))
            if module.bias is not None:
                wanted = wanted - module.bias.float()
            equations.add(traced.inputs[position], wanted)
        module.weight.data.copy_(equations.solve(self._how.ridge))
        return error.value

    def _trace(self, layer: DecoderLayer, hidden: torch.Tensor) -> _Trace:
        with _recorded(layer.module, self._modules) as seen:
            out = layer(hidden)
        # A mixture hands its shared experts the tokens of all sequences in a row.
        sequences = out.shape[:-1]
        inputs, outputs = (
            tuple(tensor.reshape(*sequences, -1) for tensor in tensors)
            for tensors in zip(*(seen[name] for name in self._modules), strict=True)
        )
        return _Trace(out, inputs, outputs)


class _Error:
    """Sums a relative squared error over batches."""

    def __init__(self) -> None:
        self._missed = self._total = 0.0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        self._missed += float((found.float() - wanted.float()).square().sum())
        self._total += float(wanted.float().square().sum())

    @property
    def value(self) -> float:
        return self._missed / self._total if self._total else 0.0


@contextmanager
def _recorded(layer: Any, modules: list[str]) -> Iterator[dict[str, Any]]:
    """Input and output of some of a layer's modules while it is run in the block."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, out: seen.update({name: (args[0], out)})

    handles = [layer.get_submodule(n).register_forward_hook(keep(n)) for n in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
