"""A recovery's inputs, opened and known to fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.model import Model
from loram_cli.runs.manifest import Manifest


@dataclass(frozen=True)
class RecoverWork:
    """A recovery's inputs, once they are known to fit.

    Attributes:
        model: The original base.
        manifest: Tells what was kept of the base: the adapter's record or, where another trainer
            made it, that of the pruned directory.
        inputs: Path and digests of all.
        factors: The directory of the factors: the adapter's own, or of one of its checkpoints.
        trained: The record of what was trained, with its chat template.
        copies: Tensors of the adapter's file that are the small model's own.
    """

    model: Model
    manifest: Manifest
    inputs: dict[str, Any]
    factors: Path
    trained: Mapping[str, Any]
    copies: frozenset[str] = frozenset()
