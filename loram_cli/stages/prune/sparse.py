"""Zero single weights of every decoder linear (``semi``, ``unst``); shapes stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.layerwise.sparsegpt_pass import changed_layers
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.pruning.sparsegpt import Hessian, inverse_factor, sparsegpt
from loram_cli.pruning.sparsity import magnitude_mask
from loram_cli.reporting import Reporter
from loram_cli.stages.core.results import PruneResult
from loram_cli.stages.prune.calibration import load_windows, open_pool
from loram_cli.stages.prune.plan import PruneWork
from loram_cli.stages.prune.rewrite import Changes, write_linears_changed
from loram_cli.stages.prune.spec import PruneSpec

Weights = dict[str, torch.Tensor]


def write_sparse(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> tuple[PruneResult, dict[str, str]]:
    """Write the base with zeros in the weights of its decoder linears, and nothing else changed.

    Returns:
        The plan's figures with what was counted, and the digests of the shards.

    Raises:
        LoramError: NaN weights, unusable calibration text, or a Hessian that has no inverse.
    """
    linear_params = zeros = 0

    def take(weight: torch.Tensor) -> torch.Tensor:
        nonlocal linear_params, zeros
        linear_params += weight.numel()
        zeros += weight.numel() - int(weight.count_nonzero())
        return weight

    digests = write_linears_changed(
        spec,
        work,
        directory,
        lambda reader: _pruned_weights(spec, work, reader, directory, reporter),
        take,
    )
    nonzero = work.base_params - zeros
    counted = replace(
        work.result(),
        pruned_params=nonzero,
        reduction=round(work.base_params / nonzero, 4),
        removed_share=round(zeros / work.base_params, 4),
        zeros=zeros,
        decoder_linear_params=linear_params,
        measured_sparsity=round(zeros / linear_params, 6),
    )
    return counted, digests


def sparsity_record(spec: PruneSpec, result: PruneResult) -> dict[str, Any]:
    """A record for later stages: zeros must stay zeros, and where they are."""
    return {
        "strategy": spec.strategy,
        "sparsity": spec.ratio,
        "method": spec.method,
        "zeros": result.zeros,
        "mask": "the zeros in the weights of the decoder linears",
    }


def count_zeros(model: Model, reporter: Reporter) -> int:
    """Zeros in the decoder linears of a checkpoint, tensor by tensor.

    Raises:
        LoramError: The directory is not a sound checkpoint.
    """
    zeros = 0
    with (
        TensorReader(model.index) as reader,
        reporter.progress("count", len(model.linear_names), "tensor") as progress,
    ):
        for name in model.linear_names:
            weight = reader.read(name)
            zeros += weight.numel() - int(weight.count_nonzero())
            progress.advance()
    return zeros


def _pruned_weights(
    spec: PruneSpec,
    work: PruneWork,
    reader: TensorReader,
    directory: Path,
    reporter: Reporter,
) -> Changes[torch.Tensor]:
    """Pruned weights by name, in the order of the layers."""
    if spec.method == "l2":
        return _by_magnitude(spec, work, reader, reporter)
    return _by_sparsegpt(spec, work, directory, reporter)


def _by_magnitude(
    spec: PruneSpec, work: PruneWork, reader: TensorReader, reporter: Reporter
) -> Changes[torch.Tensor]:
    assert spec.ratio is not None
    names = work.model.linear_names
    with reporter.progress("zero", len(names), "tensor") as progress:
        for name in names:
            weight = reader.read(name)
            mask = magnitude_mask(weight, spec.ratio, semi=bool(spec.chosen_strategy.zeros_in_four))
            yield {name: weight.masked_fill_(mask, 0)}
            progress.advance()


def _by_sparsegpt(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> Changes[torch.Tensor]:
    assert spec.ratio is not None
    ratio, semi = spec.ratio, bool(spec.chosen_strategy.zeros_in_four)

    def change(weights: Weights, hessian: Hessian) -> Weights:
        factor = inverse_factor(hessian, spec.dampening, ", ".join(weights))
        return {
            name: sparsegpt(
                weight,
                factor,
                ratio,
                semi=semi,
                block_columns=spec.block_columns,
            ).to("cpu", work.tensors[name].dtype)
            for name, weight in weights.items()
        }

    assert work.calibration is not None
    windows = load_windows(spec, work.calibration)
    modules = [module.name for module in work.model.family.modules]
    with (
        LayerStream(work.model, spec.device) as stream,
        open_pool(spec, work.calibration, stream, directory) as pool,
    ):
        yield from changed_layers(stream, windows, modules, change, pool, reporter)
