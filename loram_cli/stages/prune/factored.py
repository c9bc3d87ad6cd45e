"""Hold linears as two factors: worked out layer by layer, and written as they come."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import torch

from loram_cli.arch.spec import LOW_RANK
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter
from loram_cli.modeling.layerwise.sparsegpt_pass import changed_layers
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.pruning.lowrank import factor_names, factored_name, whitened_factors
from loram_cli.pruning.sparsegpt import Hessian
from loram_cli.reporting import Reporter
from loram_cli.stages.prune.calibration import load_windows, open_pool
from loram_cli.stages.prune.plan import PruneWork
from loram_cli.stages.prune.spec import PruneSpec

Weights = dict[str, torch.Tensor]


def write_factored(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> dict[str, str]:
    """Write the base with two factors in the place of each linear that has a rank.

    Each layer's factors are those for the inputs that the factored layers before it give.

    Returns:
        SHA-256 in hex of every shard.

    Raises:
        LoramError: NaN weights, unusable calibration text, or a Hessian that cannot be factored.
    """
    entries = work.model.index.tensors
    ready: Weights = {}
    with (
        TensorReader(work.model.index, once=True) as reader,
        ShardedWriter(directory, work.tensors, spec.max_shard_bytes) as writer,
        closing(_factors(spec, work, directory, reporter)) as factored,
    ):
        for name in work.tensors:
            source = factored_name(name, entries)
            if source == name or name.endswith(".bias"):
                writer.write(name, reader.read(source))
                continue
            while name not in ready:
                ready.update(next(factored))
            writer.write(name, ready.pop(name))
        next(factored, None)  # nothing is left in it but its own end
    return writer.digests


def _factors(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> Generator[Weights]:
    """Factors by name, in the order of the layers."""
    assert work.calibration is not None
    family = work.model.family
    ranks = {
        f"{family.layer_prefix(int(i))}{name}.weight": rank
        for i, modules in work.config[LOW_RANK].items()
        for name, rank in modules.items()
    }
    found: Weights = {}

    def factor(weights: Weights, hessian: Hessian) -> Weights:
        products = {}
        for name, weight in weights.items():
            if name not in ranks:
                continue
            pair = whitened_factors(weight, hessian.total, ranks[name], spec.dampening, name)
            names = factor_names(name)
            stored = [part.to(work.tensors[n].dtype) for n, part in zip(names, pair, strict=True)]
            found.update(zip(names, (part.cpu() for part in stored), strict=True))
            # Rounded as it is written, so that later layers see what will be trained on.
            products[name] = (stored[1].float() @ stored[0].float()).to(weight.dtype)
        return products

    windows = load_windows(spec, work.calibration)
    modules = [module.name for module in family.modules]
    with (
        LayerStream(work.model, spec.device) as stream,
        open_pool(spec, work.calibration, stream, directory) as pool,
    ):
        for _ in changed_layers(stream, windows, modules, factor, pool, reporter):
            yield dict(found)
            found.clear()
