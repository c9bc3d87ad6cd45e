"""What training starts from: a model, and perhaps an earlier adapter of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.recover.stage import adapter_input
from loram_cli.training.data.layouts import Layout

if TYPE_CHECKING:
    from loram_cli.stages.train.stage import TrainSpec

_PARTS = {
    "tensors": "tensor names or shapes",
    "weights": "weights",
    "config": "config.json",
    "tokenizer": "tokenizer",
}


def describe_source(source: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Digests of the model to train on, the base that it descends from, and what was kept of it.

    Nothing has to guard the zeros of a sparse model here: its weights are frozen, and LoRA's
    product is added beside them, not inside the mask.

    Raises:
        LoramError: The directory is another stage's output.
    """
    from loram_cli.checkpoint.model import Model

    identity = {"path": str(source), **Model.open(source).identity.to_mapping()}
    if not (source / MANIFEST_NAME).is_file():
        return identity, identity, {"keep": {}}
    manifest = Manifest.read(source)
    if manifest.stage not in ("prune", "align", "merge"):
        raise LoramError(f"{source}: was made by '{manifest.stage}', a model directory is wanted")
    base = identity if manifest.stage == "merge" else dict(manifest.base)
    carried = {"keep": dict(manifest.keep), "sparsity": dict(manifest.sparsity)}
    return {**identity, "key": manifest.key}, base, carried


def adapter_values(adapter: Path) -> dict[str, int]:
    """Rank and alpha of an adapter, under their names in the spec.

    Raises:
        LoramError: It is no adapter.
    """
    from loram_cli.checkpoint.index import read_json
    from loram_cli.lora.adapter import CONFIG_NAME

    config = read_json(adapter / CONFIG_NAME)
    known = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    for name, value in known.items():
        if type(value) is not int:
            raise LoramError(f"{adapter / CONFIG_NAME}: {name} is {value!r}, a number is wanted")
    return known


def adapter_targets(adapter: Path) -> tuple[str, ...]:
    """Names of the modules that have factors in an adapter."""
    from loram_cli.lora.adapter import read_shapes

    return tuple(sorted({name.rpartition(".")[2] for name in read_shapes(adapter)}))


def check_start(
    spec: "TrainSpec", source: Mapping[str, Any], keep: Mapping[str, Any], targets: tuple[str, ...]
) -> dict[str, str]:
    """Refuse to go on from an adapter of another model, other widths or another shape.

    Args:
        spec: With ``from_adapter``.
        source: Identity of the model to train on.
        keep: What was kept of the base in it.
        targets: Modules that are to have factors.

    Returns:
        The adapter's record for the manifest.

    Raises:
        LoramError: It was trained on another model, or is another stage's output.
        UsageError: Its rank, alpha or targets are not the spec's.
    """
    adapter = spec.from_adapter
    assert adapter is not None
    manifest = Manifest.read(adapter)
    if manifest.stage != "train":
        raise LoramError(
            f"{adapter}: was made by '{manifest.stage}', an output of 'train' is wanted",
            "go on from the small adapter, and recover the result",
        )
    trained_on = manifest.inputs.get("source", {})
    for part, said in _PARTS.items():
        if trained_on.get(part) != source[part]:
            raise LoramError(
                f"{adapter}: was trained on another model: {said} differ from {source['path']}",
                f"pass --in {trained_on.get('path')}, or train that adapter anew",
            )
    if manifest.keep != keep:
        raise LoramError(f"{adapter}: its keep indices are not those of {source['path']}")
    for name, value in adapter_values(adapter).items():
        if getattr(spec, name) != value:
            raise UsageError(
                f"--{name} {getattr(spec, name)} is not that of {adapter} ({value})",
                f"an adapter keeps its {name}: pass {value}, or leave it out",
            )
    if set(targets) != set(adapter_targets(adapter)):
        raise UsageError(
            f"--targets are not those of {adapter} ({', '.join(adapter_targets(adapter))})",
            "an adapter keeps its modules: leave --targets out",
        )
    return adapter_input(adapter, manifest)


def trained_layout(directory: Path | None) -> Layout | None:
    """The layout of the data that an adapter or a merged model learnt from, by its manifest.

    Args:
        directory: Written by ``train``, ``recover`` or ``merge``; None knows nothing.
    """
    if directory is None or not (directory / MANIFEST_NAME).is_file():
        return None
    results = Manifest.read(directory).results
    layout = results.get("layout") or (results.get("training") or {}).get("layout")
    return layout if layout in get_args(Layout) else None
