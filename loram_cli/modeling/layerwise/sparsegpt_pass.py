"""Layer by layer reconstruction: each layer is changed on what its changed predecessors give it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.modeling.layerwise.walk import embedded
from loram_cli.pruning.sparsegpt import Hessian
from loram_cli.reporting import Reporter

Change = Callable[[dict[str, torch.Tensor], Hessian], dict[str, torch.Tensor]]
"""From weights by tensor name, all with the same inputs, and those inputs' Hessian, to new ones."""


@torch.no_grad()
def changed_layers(
    stream: LayerStream,
    windows: torch.Tensor,
    modules: Sequence[str],
    change: Change,
    pool: BoundaryPool,
    reporter: Reporter,
) -> Iterator[dict[str, torch.Tensor]]:
    """Change the linear modules of every layer, with one layer in memory.

    As in SparseGPT's reference code, all modules of a layer see the inputs that the unchanged
    layer gives them; what the changed layer gives out is the next layer's input.

    Args:
        stream: The base.
        windows: Token ids, shape (samples, length).
        modules: Names of linear modules inside a layer; a layer of another kind lacks some.
        change: Gives new weights, in the type in which they will be written.
        pool: Keeps the hidden states of one boundary.
        reporter: Progress.

    Yields:
        New weights by tensor name, from the first layer to the last.
    """
    states = embedded(stream, windows, pool.new())
    with reporter.progress("prune", stream.num_layers, "layer") as progress:
        for i in range(stream.num_layers):
            with stream.layer(i) as layer:
                mine = layer.present(modules)
                inputs = _LayerInputs(layer, mine, stream.device)
                for _, hidden in states.batches(progress, 0.4):
                    layer(hidden)
                    inputs.next_batch()
                changed: dict[str, torch.Tensor] = {}
                for names, hessian in inputs.take():
                    weights = {
                        f"{layer.prefix}{name}.weight": layer.module.get_submodule(name).weight
                        for name in names
                    }
                    for tensor_name, new in change(weights, hessian).items():
                        weights[tensor_name].copy_(new)
                        changed[tensor_name] = new
                    progress.advance(0.4 * len(names) / len(mine))
                if i + 1 < stream.num_layers:
                    states.pass_through(layer, progress, 0.2)
                else:
                    progress.advance(0.2)
                yield changed
    pool.release(states.boundary)


class _LayerInputs:
    """Collects what goes into the linear modules of a layer, once for modules that share it."""

    def __init__(self, layer: DecoderLayer, modules: Sequence[str], device: str) -> None:
        self._device = device
        self._hessians: dict[str, Hessian] = {}
        self._sharing: dict[str, list[str]] = {}
        self._seen: dict[int, tuple[torch.Tensor, str]] = {}
        self._first_batch = True
        self._hooks = [
            layer.module.get_submodule(name).register_forward_pre_hook(self._hook(name))
            for name in modules
        ]

    def next_batch(self) -> None:
        self._seen.clear()
        self._first_batch = False

    def take(self) -> Iterator[tuple[list[str], Hessian]]:
        """Modules that share their inputs, and the Hessian of these; each one is let go of."""
        for hook in self._hooks:
            hook.remove()
        for owner, names in self._sharing.items():
            yield names, self._hessians.pop(owner)

    def _hook(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def collect(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            if self._first_batch:
                # The very same tensor object, as attention hands it to its three projections.
                _, owner = self._seen.setdefault(id(args[0]), (args[0], name))
                self._sharing.setdefault(owner, []).append(name)
                if owner == name:
                    self._hessians[name] = Hessian(args[0].shape[-1], self._device)
            if name in self._hessians:
                self._hessians[name].add(args[0])

        return collect
