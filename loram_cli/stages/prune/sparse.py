"""Zero single weights of every decoder linear (``semi``, ``unst``); shapes stay."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.stages.core.lifecycle import check_free_disk

if TYPE_CHECKING:
    import torch

    from loram_cli.arch.spec import Family
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.stages.prune.plan import PrunePlan
    from loram_cli.stages.prune.stage import PruneSpec


def sparse_plan(
    spec: "PruneSpec",
    family: "Family",
    config: dict[str, Any],
    index: "CheckpointIndex",
    shapes: dict[str, tuple[int, ...]],
) -> "PrunePlan":
    """What zeroing weights will do: the base's own shapes, in the order of the layers.

    Args:
        spec: How to prune.
        family: The base's family.
        config: The base's ``config.json``; it stays as it is.
        index: The base's tensors.
        shapes: Shape of every tensor that is written.

    Raises:
        LoramError: The disk is too full, or there is no calibration text.
        UsageError: 2:4 does not fit a tensor.
    """
    import math

    from loram_cli.checkpoint.writer import TensorPlan
    from loram_cli.pruning.sparsity import SEMI_GROUP, zeros_wanted
    from loram_cli.stages.prune.calibration import calibration_needs
    from loram_cli.stages.prune.plan import PrunePlan

    geometry = family.geometry(config)
    zeros = 0
    for name in family.linear_names(len(geometry.layers)):
        if spec.strategy == "semi" and shapes[name][1] % SEMI_GROUP:
            raise UsageError(
                f"--strategy semi: tensor {name} has {shapes[name][1]} columns, "
                "which is no multiple of 4",
                "pass --strategy unst --ratio 0.5",
            )
        zeros += zeros_wanted(math.prod(shapes[name]), spec.ratio)
    stored = index.tensors[f"{family.embedding}.weight"].dtype.to_torch()
    calibration = (
        calibration_needs(spec, family, config, stored) if spec.needs_calibration else None
    )
    scratch_bytes = calibration.disk_bytes if calibration else 0
    tensors = {name: TensorPlan.like(index.tensors[name]) for name in shapes}
    check_free_disk(spec.out, sum(t.num_bytes for t in tensors.values()) + scratch_bytes)
    params = sum(math.prod(shape) for shape in shapes.values())
    return PrunePlan(
        family,
        config,
        index,
        geometry,
        geometry.layers,
        tensors,
        params,
        params - zeros,
        calibration,
        sparsity=spec.ratio,
    )


def write_sparse(
    spec: "PruneSpec", planned: "PrunePlan", directory: Path, reporter: Reporter
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the base with zeros in the weights of its decoder linears, and nothing else changed.

    Args:
        spec: How to prune.
        planned: The base; its tensors in the order of the layers.
        directory: Where the checkpoint goes.
        reporter: Told of progress.

    Returns:
        What was counted (zeros in the decoder linears, parameters that are not zero), and the
        digests of the shards.

    Raises:
        LoramError: NaN weights, unusable calibration text, or a Hessian that has no inverse.
    """
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.checkpoint.writer import ShardedWriter

    linears = set(planned.family.linear_names(len(planned.before.layers)))
    linear_params = zeros = 0
    ready: dict[str, torch.Tensor] = {}
    with (
        TensorReader(planned.index, once=True) as reader,
        ShardedWriter(directory, planned.tensors, spec.max_shard_bytes) as writer,
        closing(_pruned_weights(spec, planned, reader, directory, reporter)) as pruned,
    ):
        for name in planned.tensors:
            if name not in linears:
                writer.write(name, reader.read(name))
                continue
            while name not in ready:
                ready.update(next(pruned))
            weight = ready.pop(name)
            linear_params += weight.numel()
            zeros += weight.numel() - int(weight.count_nonzero())
            writer.write(name, weight)
        next(pruned, None)  # nothing is left in it but its own end
    nonzero = planned.base_params - zeros
    counted = {
        "pruned_params": nonzero,
        "reduction": round(planned.base_params / nonzero, 4),
        "removed_share": round(zeros / planned.base_params, 4),
        "zeros": zeros,
        "decoder_linear_params": linear_params,
        "measured_sparsity": round(zeros / linear_params, 6),
    }
    return counted, writer.digests


def sparsity_record(spec: "PruneSpec", results: dict[str, Any]) -> dict[str, Any]:
    """What later stages are told: that zeros are to stay zeros, and where they are."""
    return {
        "strategy": spec.strategy,
        "sparsity": spec.ratio,
        "method": spec.method,
        "zeros": results["zeros"],
        "mask": "the zeros in the weights of the decoder linears",
    }


def count_zeros(directory: Path, reporter: Reporter) -> int:
    """Zeros in the decoder linears of a checkpoint, tensor by tensor.

    Raises:
        LoramError: The directory is not a sound checkpoint of a known family.
    """
    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import CheckpointIndex, read_config
    from loram_cli.checkpoint.reader import TensorReader

    config = read_config(directory)
    family = family_for(config, str(directory))
    names = list(family.linear_names(config["num_hidden_layers"]))
    zeros = 0
    with (
        TensorReader(CheckpointIndex.open(directory)) as reader,
        reporter.progress("count", len(names), "tensor") as progress,
    ):
        for name in names:
            weight = reader.read(name)
            zeros += weight.numel() - int(weight.count_nonzero())
            progress.advance()
    return zeros


def _pruned_weights(
    spec: "PruneSpec",
    planned: "PrunePlan",
    reader: "TensorReader",
    directory: Path,
    reporter: Reporter,
) -> "Iterator[dict[str, torch.Tensor]]":
    """Pruned weights by name, in the order of the layers."""
    if spec.method == "l2":
        return _by_magnitude(spec, planned, reader, reporter)
    return _by_sparsegpt(spec, planned, directory, reporter)


def _by_magnitude(
    spec: "PruneSpec", planned: "PrunePlan", reader: "TensorReader", reporter: Reporter
) -> "Iterator[dict[str, torch.Tensor]]":
    from loram_cli.pruning.sparsity import magnitude_mask

    names = list(planned.family.linear_names(len(planned.before.layers)))
    with reporter.progress("zero", len(names), "tensor") as progress:
        for name in names:
            weight = reader.read(name)
            mask = magnitude_mask(weight, spec.ratio, semi=spec.strategy == "semi")
            yield {name: weight.masked_fill_(mask, 0)}
            progress.advance()


def _by_sparsegpt(
    spec: "PruneSpec", planned: "PrunePlan", directory: Path, reporter: Reporter
) -> "Iterator[dict[str, torch.Tensor]]":
    from loram_cli.modeling.layerwise.sparsegpt_pass import changed_layers
    from loram_cli.modeling.layerwise.stream import LayerStream
    from loram_cli.pruning.sparsegpt import Hessian, inverse_factor, sparsegpt
    from loram_cli.stages.prune.calibration import load_windows, open_pool

    def change(weights: dict[str, "torch.Tensor"], hessian: Hessian) -> dict[str, "torch.Tensor"]:
        factor = inverse_factor(hessian, spec.dampening, ", ".join(weights))
        return {
            name: sparsegpt(
                weight,
                factor,
                spec.ratio,
                semi=spec.strategy == "semi",
                block_columns=spec.block_columns,
            ).to("cpu", planned.tensors[name].dtype)
            for name, weight in weights.items()
        }

    assert planned.calibration is not None
    windows = load_windows(spec, planned.calibration)
    modules = [module.name for module in planned.family.modules]
    with (
        LayerStream(spec.model, spec.device) as stream,
        open_pool(spec, planned.calibration, stream, directory) as pool,
    ):
        yield from changed_layers(stream, windows, modules, change, pool, reporter)
