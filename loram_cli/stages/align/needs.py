"""What alignment will take of disk and memory, from tensor indices alone."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.runs.processes import process_count

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.stages.align.stage import AlignSpec


def frozen_params(spec: "AlignSpec", family: "Family", index: "CheckpointIndex") -> int:
    """Parameters that training leaves alone: those of an untied head, unless it is trained too."""
    head = index.tensors.get(f"{family.lm_head}.weight")
    return 0 if head is None or spec.train_lm_head else math.prod(head.shape)


def align_needs(
    spec: "AlignSpec", family: "Family", index: "CheckpointIndex", base: dict[str, Any] | None
) -> tuple[int, int]:
    """Bytes of disk and of memory, activations aside, at most."""
    from loram_cli.checkpoint.index import CheckpointIndex

    full = CheckpointIndex.open(Path(base["path"])) if base else None
    # The output, and what each method before the last one leaves until the end.
    disk = index.num_bytes * len(spec.method)
    memory = 0
    params, frozen = index.num_params, frozen_params(spec, family, index)
    for method in spec.method:
        if method == "reconstruct":
            assert full is not None
            # Fitted tensors until they are written; one layer of each model, and the sums.
            disk += index.num_bytes
            layers = [_largest_layer(family, each) for each in (full, index)]
            memory = max(memory, 2 * sum(layers) + _equation_bytes(family, index))
            continue
        # fp32 weights, gradients and AdamW's two moments; a checkpoint holds all but the
        # gradients, and the next one is written before the one before last is removed.
        disk += 3 * 4 * (3 * params - 2 * frozen)
        teacher = 4 * full.num_params if method == "distill" and full is not None else 0
        state = 4 * (4 * params - 3 * frozen)
        if spec.fsdp:
            state = -(-state // process_count()) + _gathered_bytes(spec, family)
        memory = max(memory, state + teacher)
    return disk, memory


def _gathered_bytes(spec: "AlignSpec", family: "Family") -> int:
    """What is whole at a time of a model that is shared out: fp32 weights, and gradients."""
    from loram_cli.checkpoint.index import read_config
    from loram_cli.memory.sharing import GATHERED_LAYERS, gathered_bytes

    layer, after = gathered_bytes(family, read_config(spec.source), lambda name, params: 4 * params)
    return (GATHERED_LAYERS + 1) * layer + 2 * after


def _largest_layer(family: "Family", index: "CheckpointIndex") -> int:
    """Bytes of the largest decoder layer."""
    layers: dict[str, int] = {}
    prefix = f"{family.layers}."
    for name, entry in index.tensors.items():
        if name.startswith(prefix):
            layer = name[len(prefix) :].partition(".")[0]
            layers[layer] = layers.get(layer, 0) + entry.num_bytes
    return max(layers.values())


def _equation_bytes(family: "Family", index: "CheckpointIndex") -> int:
    """Normal equations of the largest module: two square sums, and two of the weight's shape."""
    found = [
        entry.shape
        for name, entry in index.tensors.items()
        if (named := family.module_named(name.removesuffix(".weight"))) and named[1].columns
    ]
    return max(8 * 2 * columns * (columns + rows) for rows, columns in found)
