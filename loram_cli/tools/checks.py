"""Checks of one directory by itself: files, weights, adapter. Each problem is one line."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loram_cli.arch.experts import EXPERTS_TARGET, plain_target
from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Family
from loram_cli.arch.wrappers import wrapper_of
from loram_cli.checkpoint.header import TensorEntry
from loram_cli.checkpoint.index import CheckpointIndex, read_config, read_json
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.sources import require_tokenizer
from loram_cli.checkpoint.tokenizer_files import check_tokenizer
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import WEIGHTS_NAME, model_copies
from loram_cli.lora.wrapped import read_adapter
from loram_cli.pruning.groups import kept_layers, layer_keeps
from loram_cli.reporting import Reporter
from loram_cli.runs.digests import file_digest
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.core.lineage import PARTS


def check_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Every file against the bytes and digest that the manifest recorded, and none beside."""
    for name, record in manifest.outputs.items():
        file = directory / name
        if not file.is_file():
            yield f"{file}: is missing"
        elif file.stat().st_size != record["bytes"]:
            yield f"{file}: {file.stat().st_size} bytes, {record['bytes']} were written"
        elif file_digest(file) != f"sha256:{record['sha256']}":
            yield f"{file}: its bytes are not those that were written (sha256 differs)"
    for file in sorted(directory.rglob("*") if manifest.outputs else ()):
        name = file.relative_to(directory).as_posix()
        # What begins with a dot is a tool's (.cache, .gitattributes), and no model reads it.
        known = name == MANIFEST_NAME or name in manifest.outputs or name.startswith(".")
        if not known and not file.is_dir():
            yield f"{file}: was put here afterwards (not in {MANIFEST_NAME})"


def check_whole_base(base: Mapping[str, Any], directory: Path) -> Iterator[str]:
    """Every byte of a base: its digests from the manifest, or those that name the hub's files."""
    recorded = dict(base.get("files") or hub_digests(directory))
    for name, digest in recorded.items():
        file = directory / name
        if not file.is_file():
            yield f"{file}: is missing, and was there when the base was pruned"
        elif file_digest(file) != digest:
            yield f"{file}: its bytes are not those of the base that was pruned (sha256 differs)"


def hub_digests(directory: Path) -> dict[str, str]:
    """SHA-256 by name of what the hub's cache holds: large files lie there under their digests."""
    blobs = {file.name: file.resolve().name for file in directory.iterdir() if file.is_symlink()}
    return {name: f"sha256:{blob}" for name, blob in blobs.items() if len(blob) == 64}


def check_neighbour(manifest: Manifest, about: str, parent: Manifest) -> Iterator[str]:
    """What an output carries along of its base, against the record that it has it from."""
    if parent.stage not in ("prune", "align", "train", "recover"):
        return
    # What continues a recovered adapter keeps all of the base.
    if parent.stage != "recover" and manifest.keep != parent.keep:
        yield f"{about} keeps other heads or channels than its record says"
    mine, theirs = manifest.base, parent.base
    differing = [name for name in PARTS if name in theirs and mine.get(name) != theirs[name]]
    if differing:
        yield f"{about} descends from another base than its record says ({', '.join(differing)})"


def check_checkpoint(
    directory: Path, keep: Mapping[str, Any], reporter: Reporter, *, values: bool
) -> Iterator[str]:
    """A model directory: headers, shapes against its config, tokenizer, and maybe values."""
    try:
        config = read_config(directory)
        index = CheckpointIndex.open(directory)
    except LoramError as error:
        yield error.message
        return
    try:
        family = family_for(config, str(directory))
        expected = family.tensor_shapes(config)
        yield from _shape_problems(directory, config, index, family, expected)
        yield from _keep_problems(directory, config, family, keep)
    except LoramError as error:
        yield error.message
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        yield f"{directory / 'config.json'}: cannot be understood ({type(error).__name__}: {error})"
    try:
        require_tokenizer(directory)
        check_tokenizer(directory, int(config["vocab_size"]))
    except LoramError as error:
        yield error.message
    if values:
        yield from _value_problems(index, reporter)


def check_adapter(
    directory: Path, keep: Mapping[str, Any], stage: str | None, model: Path | None
) -> Iterator[str]:
    """An adapter directory: factors against its config, the model's shapes and the keep indices.

    Args:
        directory: With ``adapter_config.json``.
        keep: Kept indices per pruned layer, from its manifest.
        stage: The stage that made it, if one of ours did.
        model: The model that it fits (small for ``train``, the base otherwise), where it is still
            at hand.
    """
    try:
        # PEFT copies parts of the model beside the factors of a head; ours leaves them out.
        copies = frozenset(model_copies(directory)) if stage is None else frozenset()
        wrapper = wrapper_of(read_json(model / "config.json")) if model else None
        adapter = read_adapter(directory, wrapper, copies)
    except LoramError as error:
        yield error.message
        return
    file = directory / WEIGHTS_NAME
    targets = adapter.config.get("target_modules")
    stacked = bool(adapter.config.get("target_parameters"))
    for module in adapter.pairs:
        if stacked and plain_target(module) == EXPERTS_TARGET:
            continue
        if isinstance(targets, list) and not any(
            module == target or module.endswith(f".{target}") for target in targets
        ):
            yield f"{file}: {module} is not among the target_modules of adapter_config.json"
    if model is None:
        return
    try:
        config = read_config(model)
        family = family_for(config, str(model))
        shapes = family.tensor_shapes(config)
        shapes.setdefault(f"{family.lm_head}.weight", shapes[f"{family.embedding}.weight"])
    except LoramError as error:
        yield error.message
        return
    fitting = True
    for module, pair in adapter.pairs.items():
        adapted = family.adapted_weight(module, shapes)
        want = None if adapted is None else (adapted.rows, adapted.columns)
        have = (pair.lora_b.shape[0], pair.lora_a.shape[1])
        if want is None:
            yield f"{file}: module {module} does not exist in {model}"
        elif tuple(have) != tuple(want):
            yield f"{file}: {module} is {have[0]} x {have[1]}, {model} has {want[0]} x {want[1]}"
        fitting = fitting and want is not None and tuple(have) == tuple(want)
    if stage == "recover" and keep and fitting:
        yield from _scatter_problems(file, adapter, family, config, keep)


def _shape_problems(
    directory: Path,
    config: Mapping[str, Any],
    index: CheckpointIndex,
    family: Family,
    expected: Mapping[str, tuple[int, ...]],
) -> Iterator[str]:
    for name, shape in expected.items():
        entry = index.tensors.get(name)
        if entry is None:
            yield f"{directory}: tensor {name} is missing from the weights"
        elif entry.shape != tuple(shape):
            yield (
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, "
                f"config.json asks for {list(shape)}"
            )
    head = f"{family.lm_head}.weight"
    for name, entry in index.tensors.items():
        tied_head = name == head and family.geometry(config).tied_embeddings
        if name not in expected and not tied_head and not family.is_ignored(name):
            yield f"{entry.file}: tensor {name} is not known to this model family"


def _keep_problems(
    directory: Path, config: Mapping[str, Any], family: Family, keep: Mapping[str, Any]
) -> Iterator[str]:
    layers = family.geometry(config).layers
    left = kept_layers(keep)
    if left is not None:
        if len(left) != len(layers):
            yield (
                f"{directory / 'config.json'}: has {len(layers)} layers, "
                f"{MANIFEST_NAME} keeps {len(left)}"
            )
        return
    for layer, kept in keep.items():
        if int(layer) >= len(layers):
            continue
        widths = layers[int(layer)]
        for key, width, there in (
            ("key_value_heads", "num_key_value_heads", widths.has_attention),
            ("intermediate", "intermediate_size", widths.has_mlp),
        ):
            stated = getattr(widths, width)
            if there and key in kept and len(kept[key]) != stated:
                yield (
                    f"{directory / 'config.json'}: layer {layer} has {width} {stated}, "
                    f"{MANIFEST_NAME} keeps {len(kept[key])}"
                )


def _value_problems(index: CheckpointIndex, reporter: Reporter) -> Iterator[str]:
    with (
        TensorReader(index, once=True, finite=False) as reader,
        reporter.progress("values", index.num_bytes / 2**20, "MiB") as progress,
    ):
        for name, entry in index.tensors.items():
            if entry.dtype.is_floating_point and entry.dtype.itemsize > 1:
                yield from _bad_values(entry, reader.read(name))
            progress.advance(entry.num_bytes / 2**20)


def _bad_values(entry: TensorEntry, tensor: Any) -> Iterator[str]:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        yield (
            f"{entry.file}: tensor {entry.name} has {bad} NaN or infinite values "
            f"of {math.prod(entry.shape)}"
        )


def _scatter_problems(
    file: Path, adapter: Any, family: Family, config: Mapping[str, Any], keep: Mapping[str, Any]
) -> Iterator[str]:
    """A recovered factor must be zero outside the kept rows and columns."""
    import torch

    geometry = family.geometry(config)
    keeps, layers = layer_keeps(keep), kept_layers(keep)
    for module, pair in adapter.pairs.items():
        found = family.module_named(module)
        if found is not None and layers is not None and found[0] not in layers:
            if torch.count_nonzero(pair.lora_b):
                yield f"{file}: {module} is of a layer that was dropped, and its lora_B not zero"
            continue
        if found is None or found[0] not in keeps:
            continue
        layer, linear = found
        kept = keeps[layer]
        rows = kept.rows(linear, geometry.layers[layer])
        columns = kept.columns(linear, geometry.layers[layer])
        for name, factor, axis, indices in (
            ("lora_B", pair.lora_b, 0, rows),
            ("lora_A", pair.lora_a, 1, columns),
        ):
            if indices is None:
                continue
            inside = torch.count_nonzero(factor.index_select(axis, torch.tensor(indices)))
            if inside != torch.count_nonzero(factor):
                yield f"{file}: {module} {name} is not zero outside the kept indices"
