"""Gradients of the loss by what linear modules give out, in files until they are needed."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.gradients import layer_gradients
from loram_cli.modeling.layerwise.states import Boundary, BoundaryPool
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.reporting import Reporter

# Gradients are tiny; bf16 has the range of fp32.
_KEPT_AS = torch.bfloat16


@dataclass(frozen=True)
class _Layer:
    """One layer's gradients, side by side, and where each module's lie among them."""

    kept: Boundary
    places: Mapping[str, slice]


class OutputGradients:
    """Keeps them by tensor name. Use as a context manager, which drops what is left.

    Args:
        directory: Where the files go: for each layer one of two bytes a token and row of its
            modules.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._layers: dict[str, _Layer] = {}

    def __enter__(self) -> "OutputGradients":
        self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers.values():
            layer.kept.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def collect(
        self,
        stream: LayerStream,
        windows: torch.Tensor,
        modules: Sequence[str],
        pool: BoundaryPool,
        reporter: Reporter,
    ) -> None:
        """Run the model forward and backward over windows, a layer at a time, and keep them.

        Args:
            stream: The model.
            windows: Token ids, shape (samples, length).
            modules: Names of linear modules inside a layer; a layer of another kind lacks some.
            pool: Keeps hidden states of shape (samples, length, hidden).
            reporter: Progress.

        Raises:
            LoramError: The loss is not finite, or the disk is full.
        """
        watch = partial(self._watched, modules=modules, shape=windows.shape)
        layers = range(stream.num_layers)
        # Yields only what is ranked, and nothing is.
        for _ in layer_gradients(stream, windows, layers, (), pool, reporter, watch):
            raise AssertionError("no weight's gradient was asked for")

    def take(self, name: str) -> torch.Tensor:
        """A module's gradients by its weight's name, shape (tokens, rows)."""
        prefix, module = next(
            (prefix, name.removeprefix(prefix).removesuffix(".weight"))
            for prefix in self._layers
            if name.startswith(prefix)
        )
        layer = self._layers[prefix]
        found = layer.kept.read(0, layer.kept.shape[0])
        return found[..., layer.places[module]].flatten(0, 1)

    @contextmanager
    def _watched(
        self, index: int, layer: DecoderLayer, *, modules: Sequence[str], shape: torch.Size
    ) -> Iterator[None]:
        names = layer.present(modules)
        places, begin = {}, 0
        for name in names:
            rows = len(layer.module.get_submodule(name).weight)
            places[name] = slice(begin, begin + rows)
            begin += rows
        file = self._directory / f"{index}"
        kept = Boundary((*shape, begin), _KEPT_AS, file)
        self._layers[layer.prefix] = _Layer(kept, places)
        found: dict[str, torch.Tensor] = {}
        start = 0

        def collect(gradient: torch.Tensor, name: str) -> None:
            nonlocal start
            flat = gradient.detach().to("cpu", _KEPT_AS)
            found[name] = flat.reshape(-1, shape[1], flat.shape[-1])
            if len(found) == len(names):
                batch = torch.cat([found.pop(name) for name in names], dim=-1)
                kept.write(start, batch)
                start += len(batch)

        def watch(module: Any, args: Any, output: torch.Tensor, name: str) -> None:
            output.register_hook(partial(collect, name=name))

        hooks = [
            layer.module.get_submodule(name).register_forward_hook(partial(watch, name=name))
            for name in names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if start != shape[0]:
            raise LoramError(
                f"{layer.prefix}: the loss's gradient does not reach all of its linear modules",
                "pass --importance gptq",
            )
