"""A model of few bits for training: its decoder linears stay as they are stored."""

from typing import Any

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.skeleton import SkeletonModel, fill
from loram_cli.reporting import Reporter
from loram_cli.units import MIB


def load_low_bit(
    model: Model, *, dtype: torch.dtype, device: str, attention: str | None, reporter: Reporter
) -> Any:
    """Load a model, frozen, with :class:`.low_bit_linear.LowBitLinear` in place of its linears.

    Args:
        model: Made by ``prune --strategy lowbit``, or aligned since.
        dtype: Of all other weights, and of products.
        device: ``cpu``, ``cuda``, ...
        attention: ``sdpa``, ``flash`` or ``eager``; None and ``auto`` leave it to transformers.
        reporter: Progress.

    Raises:
        LoramError: A tensor is absent or of another shape.
    """
    skeleton = SkeletonModel(model, dtype=dtype, device=device, attention=attention)
    slots = skeleton.slots.values()
    total = sum(slot.num_bytes for slot in slots)
    with (
        TensorReader(skeleton.index, once=True) as reader,
        reporter.progress("load", total / MIB, "MiB") as progress,
    ):
        for slot in slots:
            fill(slot, skeleton.read(slot, reader))
            progress.advance(slot.num_bytes / MIB)
    return skeleton.model
