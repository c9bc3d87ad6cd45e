"""How the loss's gradients by what linear modules give out vary, in files until it is needed."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loram_cli.checkpoint.finite import is_finite
from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.gradients import layer_gradients
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.reporting import Reporter

MOST_KEPT = 2048
"""Rows that stand for all tokens of a module whose outputs are more than so many."""

# Of a factor's diagonal, as a share of its mean, so that it has one.
_JITTER = 1e-6
# Numbers are tiny; bf16 has the range of fp32.
_KEPT_AS = torch.bfloat16


def kept_params(outputs: int) -> int:
    """Numbers that are kept for a module, in two bytes each."""
    return min(outputs, MOST_KEPT) * outputs


class OutputGradients:
    """Keeps, for each linear, a matrix ``R`` with ``R^T R`` the sum of ``g g^T`` over all tokens.

    ``g`` is the loss's gradient by the module's outputs. Up to ``MOST_KEPT`` outputs the sum is
    exact, and ``R`` its Cholesky factor; of more, ``R`` is the gradients themselves, mixed by
    random signs into so many rows. Use as a context manager, which drops everything at its end.

    Args:
        directory: Where the files go, of :func:`kept_params` for each module in two bytes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}

    def __enter__(self) -> "OutputGradients":
        self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: Any) -> None:
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
            LoramError: The loss is not finite, its gradient does not reach a module, or the disk
                is full.
        """
        watch = partial(self._watched, modules=modules)
        layers = range(stream.num_layers)
        # Yields only what is ranked, and nothing is.
        for _ in layer_gradients(stream, windows, layers, (), pool, reporter, watch):
            raise AssertionError("no weight's gradient was asked for")

    def take(self, name: str) -> torch.Tensor:
        """A module's ``R`` by its weight's name, fp32, shape (kept, outputs)."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name).float()

    @contextmanager
    def _watched(
        self, index: int, layer: DecoderLayer, *, modules: Sequence[str]
    ) -> Iterator[None]:
        names = layer.present(modules)
        sums = {
            name: _Sum(len(layer.module.get_submodule(name).weight), seed=index) for name in names
        }
        hooks = [
            layer.module.get_submodule(name).register_forward_hook(_watching(sums[name].add))
            for name in names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._keep(layer.prefix, sums)

    def _keep(self, prefix: str, sums: dict[str, "_Sum"]) -> None:
        unreached = [name for name, found in sums.items() if not found.reached]
        if unreached:
            raise LoramError(
                f"{prefix}{unreached[0]}: the loss's gradient does not reach it",
                "pass --importance gptq",
            )
        file = self._directory / f"{prefix}safetensors"
        tensors = {
            f"{prefix}{name}.weight": found.kept(prefix + name) for name, found in sums.items()
        }
        try:
            save_file(tensors, file)
        except (OSError, SafetensorError) as error:
            raise LoramError(
                f"{file}: gradients cannot be kept on disk ({error})",
                "free some of it, or pass --importance gptq",
            ) from error
        self._files |= dict.fromkeys(tensors, file)


def _watching(add: Callable[[torch.Tensor], None]) -> Callable[..., None]:
    """A forward hook that hands on the gradient by what a module gives out."""

    def watch(module: Any, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: add(gradient.detach().flatten(0, -2).float()))

    return watch


class _Sum:
    """The sum of ``g g^T`` over tokens, whole or mixed by random signs."""

    def __init__(self, outputs: int, seed: int) -> None:
        self._outputs = outputs
        self._whole = outputs <= MOST_KEPT
        self._total: torch.Tensor | None = None
        self._drawn = torch.Generator().manual_seed(seed)

    @property
    def reached(self) -> bool:
        """Whether any gradient was counted."""
        return self._total is not None

    def add(self, gradient: torch.Tensor) -> None:
        """Count gradients, fp32, shape (tokens, outputs)."""
        if self._total is None:
            shape = (min(self._outputs, MOST_KEPT), self._outputs)
            self._total = torch.zeros(shape, device=gradient.device)
        left = gradient if self._whole else self._signs(len(gradient)).to(gradient.device)
        self._total.addmm_(left.T, gradient)

    def kept(self, where: str) -> torch.Tensor:
        """``R``, on the CPU.

        Raises:
            LoramError: The sum is not finite.
        """
        assert self._total is not None
        if not is_finite(self._total):
            raise LoramError(
                f"{where}: the loss's gradients on the calibration text are not finite",
                "check the base model and the calibration text",
            )
        if self._whole:
            diagonal = self._total.diagonal()
            diagonal.add_(diagonal.mean() * _JITTER + torch.finfo(torch.float32).tiny)
            self._total = _factor(self._total)
        return self._total.to("cpu", _KEPT_AS).contiguous()

    def _signs(self, tokens: int) -> torch.Tensor:
        drawn = torch.randint(2, (tokens, MOST_KEPT), generator=self._drawn)
        return (2 * drawn - 1).float() / MOST_KEPT**0.5


def _factor(total: torch.Tensor) -> torch.Tensor:
    """Upper triangular, its square the matrix; from the eigenvectors where rounding broke it."""
    factor, failed = torch.linalg.cholesky_ex(total, upper=True)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(total)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T
