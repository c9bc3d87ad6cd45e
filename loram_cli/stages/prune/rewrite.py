"""Write a checkpoint with some of its tensors changed, in the order that they come in."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter
from loram_cli.stages.prune.plan import PruneWork
from loram_cli.stages.prune.spec import PruneSpec

Changed = TypeVar("Changed")
Changes = Generator[Mapping[str, Changed]]


def write_linears_changed(
    spec: PruneSpec,
    work: PruneWork,
    directory: Path,
    changes: Callable[[TensorReader], Changes[Changed]],
    take: Callable[[Changed], torch.Tensor],
) -> dict[str, str]:
    """Write the model with its decoder linears changed, and every other tensor as it is.

    Only what has been changed and not yet been written is in memory.

    Args:
        spec: Of the stage.
        work: What the plan found: the model, and the tensors to write.
        directory: Where the shards go.
        changes: From a reader of the model to its changed linears by name, some at a time, in the
            order of the layers.
        take: From what ``changes`` yields for a linear to the tensor written; called once for
            each, so that it may count.

    Returns:
        The digests of the shards.
    """
    linears = set(work.model.linear_names)
    ready: dict[str, Changed] = {}
    with (
        TensorReader(work.model.index, once=True) as reader,
        ShardedWriter(directory, work.tensors, spec.max_shard_bytes) as writer,
        closing(changes(reader)) as changed,
    ):
        for name in work.tensors:
            if name not in linears:
                writer.write(name, reader.read(name))
                continue
            while name not in ready:
                ready.update(next(changed))
            writer.write(name, take(ready.pop(name)))
        next(changed, None)  # nothing is left in it but its own end
    return writer.digests
