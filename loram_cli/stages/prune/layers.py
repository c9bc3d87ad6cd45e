"""Drop whole decoder layers: rank them by what they change, and write the others."""

from pathlib import Path

import torch

from loram_cli.checkpoint.background import read_ahead
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter
from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.layerwise.walk import embedded
from loram_cli.pruning.depth import keep_influential, shorter_names
from loram_cli.pruning.plan import pruned_layers
from loram_cli.reporting import Reporter
from loram_cli.stages.prune.calibration import load_windows, open_pool
from loram_cli.stages.prune.plan import PruneWork
from loram_cli.stages.prune.spec import PruneSpec


def choose_layers(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> tuple[int, ...]:
    """Indices of the layers that stay.

    Raises:
        LoramError: The calibration text is unusable, or hidden states on it are not finite.
    """
    assert work.kept_layers is not None
    count = len(work.before.layers)
    influence = _influence(spec, work, directory, reporter)
    return keep_influential(influence, count - len(work.kept_layers), count)


def write_layers(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> dict[str, str]:
    """Write the tensors of the layers that stay, under their new names.

    Returns:
        SHA-256 in hex of every shard.
    """
    model = work.model
    assert work.kept_layers is not None
    sources = shorter_names(model.family, list(model.index.tensors), work.kept_layers)
    with (
        TensorReader(model.index, once=True) as reader,
        ShardedWriter(directory, work.tensors, spec.max_shard_bytes) as writer,
        reporter.progress("write", work.out_bytes / 2**20, "MiB") as progress,
        read_ahead(
            (name, rows) for name in work.tensors for _, rows in reader.read_chunks(sources[name])
        ) as chunks,
    ):
        for name, rows in chunks:
            writer.write(name, rows)
            progress.advance(rows.nbytes / 2**20)
    return writer.digests


@torch.no_grad()
def _influence(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> dict[int, float]:
    """One minus the mean cosine between input and output of each layer that may go."""
    assert work.calibration is not None
    windows = load_windows(spec, work.calibration)
    layers = pruned_layers(len(work.before.layers), spec.keep_first, spec.keep_last)
    found: dict[int, float] = {}
    with (
        LayerStream(work.model, spec.device) as stream,
        open_pool(spec, work.calibration, stream, directory) as pool,
        reporter.progress("rank", layers.stop, "layer") as progress,
    ):
        states = embedded(stream, windows, pool.new())
        # What follows the last layer that may go decides nothing.
        for i in range(layers.stop):
            total = torch.zeros((), dtype=torch.float64)
            with stream.layer(i) as layer:
                for start, hidden in states.batches(progress):
                    out = layer(hidden)
                    cosines = torch.cosine_similarity(hidden.float(), out.float(), dim=-1)
                    total += cosines.double().sum().cpu()
                    states.boundary.write(start, out)
            if i in layers:
                found[i] = 1 - float(total) / windows.numel()
        pool.release(states.boundary)
    if not all(value == value for value in found.values()):
        raise LoramError("hidden states of the base on the calibration text are not finite")
    return found
