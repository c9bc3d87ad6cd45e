"""Recover: LoRA factors of the pruned model, scattered to the full model's shapes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.common import StageResult, check_free_disk, check_out_of_tree, stage_run
from loram_cli.stages.evaluate import training_record
from loram_cli.stages.templates import warn_of_other_template

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family, Geometry
    from loram_cli.checkpoint.adapter import LoraAdapter, LoraPair
    from loram_cli.pruning.groups import LayerKeep


@dataclass(frozen=True, kw_only=True)
class RecoverSpec:
    """What to recover.

    Attributes:
        adapter: The directory that ``train`` wrote; it carries the keep indices.
        model: The original base.
        out: Where the recovered adapter goes.
        force: Replace an existing output.
    """

    adapter: Path
    model: Path
    out: Path
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class MergeSpec:
    """What to merge.

    Attributes:
        adapter: A recovered adapter.
        model: The original base.
        out: Where the merged checkpoint goes.
        max_shard_bytes: Upper bound on one shard.
        force: Replace an existing output.
    """

    adapter: Path
    model: Path
    out: Path
    max_shard_bytes: int = 5 * 10**9
    force: bool = False


def check_base(manifest: Manifest, model: Path, adapter: Path) -> dict[str, Any]:
    """Compare the base at hand with the one that the adapter descends from.

    Returns:
        The base's identity, for the next manifest.

    Raises:
        LoramError: Widths, weights or tokenizer differ.
    """
    from loram_cli.checkpoint.identity import identify

    identity = identify(model).to_mapping()
    for part, said in (
        ("tensors", "tensor names or shapes"),
        ("weights", "weights"),
        ("config", "config.json"),
        ("tokenizer", "tokenizer"),
    ):
        if manifest.base.get(part) != identity[part]:
            raise LoramError(
                f"{adapter}: was trained for another base: {said} differ from {model}",
                f"pass the base that was pruned, formerly at {manifest.base.get('path')}",
            )
    return {"path": str(model), **identity}


def _open_inputs(
    spec: RecoverSpec | MergeSpec, stage: str, otherwise: str
) -> tuple[Manifest, dict[str, Any]]:
    """The adapter's manifest and the record of both inputs, once they are known to fit."""
    check_out_of_tree(spec.out, spec.model, spec.adapter)
    manifest = Manifest.read(spec.adapter)
    if manifest.stage != stage:
        raise LoramError(f"{spec.adapter}: was made by '{manifest.stage}', {otherwise}")
    base = check_base(manifest, spec.model, spec.adapter)
    return manifest, {"base": base, "adapter": adapter_input(spec.adapter, manifest)}


def run(spec: RecoverSpec, reporter: Reporter) -> StageResult:
    """Scatter an adapter to the base's shapes and check it factor by factor.

    Raises:
        LoramError: Another base, an adapter that does not fit, or a failed check.
    """
    manifest, inputs = _open_inputs(spec, "train", "'train' output is wanted")
    with stage_run("recover", spec, inputs, spec.adapter) as stage:
        if stage.finished is not None:
            return stage.finished
        from loram_cli.arch.registry import family_for
        from loram_cli.checkpoint.adapter import LoraAdapter
        from loram_cli.checkpoint.index import read_config
        from loram_cli.checkpoint.sources import copy_companions, hub_id
        from loram_cli.pruning.groups import LayerKeep

        stage.restart_meter()
        warn_of_other_template(manifest.inputs["source"], inputs["base"], reporter)
        small = LoraAdapter.read(spec.adapter)
        config = read_config(spec.model)
        family = family_for(config, str(spec.model))
        geometry = family.geometry(config)
        keep = {int(i): LayerKeep.from_mapping(layer) for i, layer in manifest.keep.items()}
        full = recover_adapter(small, family, config, geometry, keep, reporter)
        name = hub_id(spec.model) or str(spec.model)
        named = {**full.config, "base_model_name_or_path": name, "inference_mode": True}
        replace(full, config=named).write(stage.path)
        copy_companions(spec.model, stage.path)
        return stage.commit(
            {
                "modules": len(full.pairs),
                "small_params": _params(small),
                "full_params": _params(full),
                "training": training_record(manifest),
            },
            base=inputs["base"],
            keep=manifest.keep,
        )


def recover_adapter(
    small: "LoraAdapter",
    family: "Family",
    config: dict[str, Any],
    geometry: "Geometry",
    keep: "dict[int, LayerKeep]",
    reporter: Reporter,
) -> "LoraAdapter":
    """Bring every factor to the full shapes.

    Args:
        small: The adapter of the pruned model.
        family: The base's family.
        config: The base's ``config.json``.
        geometry: The base's widths.
        keep: Kept indices of every pruned layer.
        reporter: Told of progress.

    Raises:
        LoramError: A module or shape is not the base's, or the check of the result fails.
    """
    shapes = family.tensor_shapes(config)
    head = f"{family.lm_head}.weight"
    shapes.setdefault(head, shapes[f"{family.embedding}.weight"])
    pairs = {}
    with reporter.progress("scatter", len(small.pairs), "module") as progress:
        for module, pair in small.pairs.items():
            if f"{module}.weight" not in shapes:
                raise LoramError(f"adapter module {module} does not exist in the base")
            pairs[module] = _recover_pair(module, pair, shapes, family, geometry, keep)
            progress.advance()
    return replace(small, pairs=pairs)


def merge(spec: MergeSpec, reporter: Reporter) -> StageResult:
    """Write the base with the adapter added, tensor by tensor.

    Raises:
        LoramError: Another base, or no disk.
    """
    from loram_cli.checkpoint.index import CheckpointIndex

    _, inputs = _open_inputs(spec, "recover", "run 'loram recover' first")
    index = CheckpointIndex.open(spec.model)
    check_free_disk(spec.out, index.num_bytes)
    with stage_run("merge", spec, inputs, spec.adapter) as stage:
        if stage.finished is not None:
            return stage.finished
        import json

        from loram_cli.checkpoint.adapter import LoraAdapter
        from loram_cli.checkpoint.sources import copy_companions

        stage.restart_meter()
        adapter = LoraAdapter.read(spec.adapter)
        config = merge_weights(spec, adapter, index, stage.path, reporter)
        (stage.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(spec.model, stage.path)
        results = {"modules": len(adapter.pairs), "weight_bytes": index.num_bytes}
        return stage.commit(results, base=inputs["base"], keep={})


def merge_weights(
    spec: MergeSpec, adapter: "LoraAdapter", index: Any, directory: Path, reporter: Reporter
) -> dict[str, Any]:
    """Stream ``W + scaling * B @ A`` for every tensor of the base.

    Returns:
        The merged checkpoint's config; a tied head that the adapter changes is untied in it.
    """
    from loram_cli.adapters.scatter import add_update
    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.background import read_ahead
    from loram_cli.checkpoint.index import read_config
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan

    config = read_config(spec.model)
    family = family_for(config, str(spec.model))
    sources = {name: name for name in index.tensors if not family.is_ignored(name)}
    head = f"{family.lm_head}.weight"
    if family.lm_head in adapter.pairs and family.geometry(config).tied_embeddings:
        sources[head] = head if head in sources else f"{family.embedding}.weight"
        config = {**config, "tie_word_embeddings": False}
    planned = {
        name: TensorPlan(index.tensors[source].dtype, index.tensors[source].shape)
        for name, source in sources.items()
    }
    total_bytes = sum(tensor.num_bytes for tensor in planned.values())
    with (
        TensorReader(index) as reader,
        ShardedWriter(directory, planned, spec.max_shard_bytes) as writer,
        reporter.progress("merge", total_bytes / 2**20, "MiB") as progress,
        read_ahead(
            (name, start, rows)
            for name, source in sources.items()
            for start, rows in reader.read_chunks(source)
        ) as chunks,
    ):
        for name, start, rows in chunks:
            module = name.removesuffix(".weight")
            if module in adapter.pairs:
                add_update(rows, start, adapter.pairs[module], adapter.scaling(module))
            writer.write(name, rows)
            progress.advance(rows.nbytes / 2**20)
    return config


def adapter_input(directory: Path, manifest: Manifest) -> dict[str, str]:
    """The manifest record of an adapter that serves as input."""
    from loram_cli.checkpoint.adapter import WEIGHTS_NAME
    from loram_cli.runs.digests import file_digest

    return {
        "path": str(directory),
        "key": manifest.key,
        "weights": file_digest(directory / WEIGHTS_NAME),
    }


def _recover_pair(
    module: str,
    pair: "LoraPair",
    shapes: dict[str, tuple[int, ...]],
    family: "Family",
    geometry: "Geometry",
    keep: "dict[int, LayerKeep]",
) -> "LoraPair":
    import torch

    from loram_cli.adapters.scatter import gather, scatter_columns, scatter_rows
    from loram_cli.checkpoint.adapter import LoraPair

    full_rows, full_columns = shapes[f"{module}.weight"]
    rows = columns = None
    found = family.module_named(module)
    if found is not None and found[0] in keep:
        layer, linear = found
        rows = keep[layer].rows(linear, geometry.layers[layer])
        columns = keep[layer].columns(linear, geometry.layers[layer])
    lora_a, lora_b = pair.lora_a, pair.lora_b
    try:
        if rows is not None:
            lora_b = scatter_rows(lora_b, rows, full_rows)
        if columns is not None:
            lora_a = scatter_columns(lora_a, columns, full_columns)
    except ValueError as error:
        raise LoramError(
            f"adapter module {module} does not fit the keep indices: {error}"
        ) from error
    if lora_b.shape[0] != full_rows or lora_a.shape[1] != full_columns:
        raise LoramError(
            f"adapter module {module} is {lora_b.shape[0]} x {lora_a.shape[1]}, "
            f"the base's weight {full_rows} x {full_columns}"
        )
    same = torch.equal(gather(lora_b, rows, None), pair.lora_b) and torch.equal(
        gather(lora_a, None, columns), pair.lora_a
    )
    # Nothing may be outside the kept indices: as many non-zeros as before, and no more.
    same = same and torch.count_nonzero(lora_b) == torch.count_nonzero(pair.lora_b)
    same = same and torch.count_nonzero(lora_a) == torch.count_nonzero(pair.lora_a)
    if not same:
        raise LoramError(
            f"adapter module {module}: the recovered factors do not match the small ones"
        )
    return LoraPair(lora_a, lora_b)


def _params(adapter: "LoraAdapter") -> int:
    return sum(pair.lora_a.numel() + pair.lora_b.numel() for pair in adapter.pairs.values())
