"""Inspect: what a directory is, from only its records and headers; no weight is read."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loram_cli.arch.spec import Geometry, LayerGeometry
from loram_cli.checkpoint.header import read_header
from loram_cli.checkpoint.index import CheckpointIndex, read_config, read_json
from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.rundir import OUTPUTS, STATE_NAME, RunDirectory


@dataclass(frozen=True)
class LayerWidth:
    """Widths of one decoder layer, and the widest there is in this model or its base."""

    layer: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    kept_share: float


@dataclass(frozen=True)
class Inspection:
    """What a directory is.

    Attributes:
        directory: Where.
        kind: ``run``, ``checkpoint``, ``adapter`` or ``evaluation``.
        stage: The stage that made it; None when none of ours did.
        made_with: Version of the tool that made it.
        base: Path of the original base, where it is known.
        family: ``model_type`` of the config.
        params: Parameters in the weights here.
        weight_bytes: Their bytes.
        dtypes: Element types of the weights.
        layers: Widths per layer, of a model.
        adapter: r, alpha, targets and modules, of an adapter.
        spec: What the stage was asked for.
        results: What it measured.
        outputs: A run's finished stages.
    """

    directory: Path
    kind: str
    stage: str | None = None
    made_with: str | None = None
    base: str | None = None
    family: str | None = None
    params: int | None = None
    weight_bytes: int | None = None
    dtypes: tuple[str, ...] = ()
    layers: tuple[LayerWidth, ...] = ()
    adapter: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple["Inspection", ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        plain = asdict(self)
        plain["directory"] = str(self.directory)
        plain["outputs"] = [item.to_mapping() for item in self.outputs]
        return plain


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory claims to hold a model."""
    return (directory / "config.json").is_file()


def is_adapter(directory: Path) -> bool:
    """Whether the directory claims to hold a PEFT adapter."""
    return (directory / CONFIG_NAME).is_file()


def inspect(directory: Path) -> Inspection:
    """Tell what a directory is: a run, an output of ours, or a plain model or adapter.

    Raises:
        LoramError: It is none of these, or what it holds is damaged.
    """
    if not directory.is_dir():
        raise LoramError(f"{directory}: no such directory")
    manifest = Manifest.read(directory) if (directory / MANIFEST_NAME).is_file() else None
    parts: dict[str, Any] = {}
    if manifest is not None:
        parts = {
            "stage": manifest.stage,
            "made_with": manifest.versions.get("loram"),
            "base": manifest.base.get("path"),
            "spec": dict(manifest.spec),
            "results": dict(manifest.results),
        }
    if is_adapter(directory):
        return Inspection(directory, "adapter", **{**parts, **_adapter(directory, parts)})
    if is_checkpoint(directory):
        return Inspection(directory, "checkpoint", **parts, **_checkpoint(directory))
    if manifest is not None:
        return Inspection(directory, "evaluation", **parts)
    return _run(directory)


def _run(directory: Path) -> Inspection:
    finished = [directory / name for name in OUTPUTS.values()]
    extra = sorted({path.parent for path in directory.glob(f"*/{MANIFEST_NAME}")} - {*finished})
    outputs = [path for path in [*finished, *extra] if (path / MANIFEST_NAME).is_file()]
    if not outputs and not (directory / STATE_NAME).is_file():
        raise LoramError(
            f"{directory}: neither a run, nor an output of loram, nor a model, nor an adapter",
            f"{STATE_NAME}, {MANIFEST_NAME}, config.json and adapter_config.json are all absent",
        )
    return Inspection(
        directory,
        "run",
        base=RunDirectory(directory).remembered_model(),
        outputs=tuple(inspect(path) for path in outputs),
    )


def _checkpoint(directory: Path) -> dict[str, Any]:
    config = read_config(directory)
    index = CheckpointIndex.open(directory)
    try:
        layers = _widths(Model.open(directory).geometry)
    except (LoramError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        # Not a decoder that we know: what its headers say can still be told.
        layers = ()
    return {
        "family": config.get("model_type"),
        "params": index.num_params,
        "weight_bytes": index.num_bytes,
        "dtypes": tuple(sorted({entry.dtype.name for entry in index.tensors.values()})),
        "layers": layers,
    }


def _widths(geometry: Geometry) -> tuple[LayerWidth, ...]:
    """Each layer against the widest one, which in a pruned model is a layer left whole."""

    def linear_params(layer: LayerGeometry) -> int:
        heads = 2 * layer.num_attention_heads + 2 * layer.num_key_value_heads
        return geometry.hidden_size * (heads * layer.head_dim + 3 * layer.intermediate_size)

    widest = max(map(linear_params, geometry.layers), default=1)
    return tuple(
        LayerWidth(
            layer=i,
            num_attention_heads=layer.num_attention_heads,
            num_key_value_heads=layer.num_key_value_heads,
            intermediate_size=layer.intermediate_size,
            kept_share=linear_params(layer) / widest,
        )
        for i, layer in enumerate(geometry.layers)
    )


def _adapter(directory: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    config = read_json(directory / CONFIG_NAME)
    entries = read_header(directory / WEIGHTS_NAME)
    targets = config.get("target_modules")
    return {
        "base": parts.get("base") or config.get("base_model_name_or_path"),
        "params": sum(math.prod(entry.shape) for entry in entries),
        "weight_bytes": sum(entry.num_bytes for entry in entries),
        "dtypes": tuple(sorted({entry.dtype.name for entry in entries})),
        "adapter": {
            "peft_type": config.get("peft_type"),
            "r": config.get("r"),
            "lora_alpha": config.get("lora_alpha"),
            "target_modules": sorted(targets) if isinstance(targets, list) else targets,
            "modules": sum(".lora_A." in entry.name for entry in entries),
        },
    }
