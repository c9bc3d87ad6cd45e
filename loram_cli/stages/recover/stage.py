"""Recover: LoRA factors of the pruned model, scattered to the full model's shapes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.core.lifecycle import StageResult, check_out_of_tree, stage_run
from loram_cli.stages.core.plan import StagePlan, make_plan
from loram_cli.stages.core.templates import warn_of_other_template
from loram_cli.stages.evaluate.rows import training_record

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family, Geometry
    from loram_cli.lora.adapter import LoraAdapter, LoraPair
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


def check_base(manifest: Manifest, model: Path, adapter: Path) -> dict[str, Any]:
    """Compare the base at hand with the one that the adapter descends from.

    Returns:
        The base's identity, for the next manifest.

    Raises:
        LoramError: Widths, weights or tokenizer differ.
    """
    from loram_cli.checkpoint.model import Model

    identity = Model.open(model).identity.to_mapping()
    for part, said in (
        ("tensors", "tensor names or shapes"),
        ("weights", "weights"),
        ("config", "config.json"),
        ("tokenizer", "tokenizer"),
    ):
        if manifest.base.get(part) != identity[part]:
            raise LoramError(
                f"{adapter}: was made from another base: {said} differ from {model}",
                f"pass the base that was pruned, formerly at {manifest.base.get('path')}",
            )
    return {"path": str(model), **identity}


def open_inputs(spec: Any, stage: str, otherwise: str) -> tuple[Manifest, dict[str, Any]]:
    """The adapter's manifest and the record of both inputs, once they are known to fit.

    Args:
        spec: With ``adapter``, ``model`` and ``out``.
        stage: Which stage must have made the adapter.
        otherwise: What to say when another one did.

    Raises:
        LoramError: They do not fit.
    """
    check_out_of_tree(spec.out, spec.model, spec.adapter)
    manifest = Manifest.read(spec.adapter)
    if manifest.stage != stage:
        raise LoramError(f"{spec.adapter}: was made by '{manifest.stage}', {otherwise}")
    base = check_base(manifest, spec.model, spec.adapter)
    return manifest, {"base": base, "adapter": adapter_input(spec.adapter, manifest)}


def plan(spec: RecoverSpec) -> StagePlan:
    """Check everything that can be known before a factor is read.

    Raises:
        LoramError: Another base, an adapter that does not fit it, or no disk.
    """
    from loram_cli.lora.adapter import read_shapes

    manifest, inputs = open_inputs(spec, "train", "'train' output is wanted")
    base = _Base.of(spec.model, manifest)
    small_params = full_params = 0
    for module, (rows, columns, rank) in read_shapes(spec.adapter).items():
        full_rows, full_columns = base.full_shape(module)
        kept_rows, kept_columns = base.kept(module)
        wanted = (
            full_rows if kept_rows is None else len(kept_rows),
            full_columns if kept_columns is None else len(kept_columns),
        )
        if (rows, columns) != wanted:
            raise LoramError(
                f"adapter module {module} is {rows} x {columns}, "
                f"what was kept of the base's weight {wanted[0]} x {wanted[1]}"
            )
        small_params += rank * (rows + columns)
        full_params += rank * (full_rows + full_columns)
    return make_plan(
        "recover",
        spec,
        inputs,
        disk_bytes=4 * full_params,
        reads=(str(spec.adapter), str(spec.model)),
        base=inputs["base"],
        keep=manifest.keep,
        memory_bytes=4 * (small_params + full_params),
        figures={"small_params": small_params, "full_params": full_params},
    )


def run(spec: RecoverSpec, reporter: Reporter) -> StageResult:
    """Scatter an adapter to the base's shapes and check it factor by factor.

    Raises:
        LoramError: See :func:`plan`; also a failed check.
    """
    planned = plan(spec)
    with stage_run("recover", spec, planned.inputs, spec.adapter) as stage:
        if stage.finished is not None:
            return stage.finished
        from loram_cli.checkpoint.sources import copy_companions, hub_id
        from loram_cli.lora.adapter import LoraAdapter

        stage.restart_meter()
        manifest = Manifest.read(spec.adapter)
        warn_of_other_template(manifest.inputs["source"], planned.base, reporter)
        small = LoraAdapter.read(spec.adapter)
        full = recover_adapter(small, _Base.of(spec.model, manifest), reporter)
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
            base=planned.base,
            keep=manifest.keep,
            sparsity=manifest.sparsity,
        )


@dataclass(frozen=True)
class _Base:
    """Where an adapter's factors belong: the base's shapes, and what was kept of them."""

    family: "Family"
    geometry: "Geometry"
    shapes: dict[str, tuple[int, ...]]
    keep: dict[int, "LayerKeep"]

    @classmethod
    def of(cls, model: Path, manifest: Manifest) -> "_Base":
        from loram_cli.arch.registry import family_for
        from loram_cli.checkpoint.index import read_config
        from loram_cli.pruning.groups import LayerKeep

        config = read_config(model)
        family = family_for(config, str(model))
        shapes = family.tensor_shapes(config)
        shapes.setdefault(f"{family.lm_head}.weight", shapes[f"{family.embedding}.weight"])
        keep = {int(i): LayerKeep.from_mapping(layer) for i, layer in manifest.keep.items()}
        return cls(family, family.geometry(config), shapes, keep)

    def full_shape(self, module: str) -> tuple[int, ...]:
        if f"{module}.weight" not in self.shapes:
            raise LoramError(f"adapter module {module} does not exist in the base")
        return self.shapes[f"{module}.weight"]

    def kept(self, module: str) -> tuple[list[int] | None, list[int] | None]:
        found = self.family.module_named(module)
        if found is None or found[0] not in self.keep:
            return None, None
        layer, linear = found
        keep, geometry = self.keep[layer], self.geometry.layers[layer]
        return keep.rows(linear, geometry), keep.columns(linear, geometry)


def recover_adapter(small: "LoraAdapter", base: _Base, reporter: Reporter) -> "LoraAdapter":
    """Bring every factor of a pruned model's adapter to the base's shapes.

    Raises:
        LoramError: A module or shape is not the base's, or the check of the result fails.
    """
    pairs = {}
    with reporter.progress("scatter", len(small.pairs), "module") as progress:
        for module, pair in small.pairs.items():
            pairs[module] = _recover_pair(module, pair, base)
            progress.advance()
    return replace(small, pairs=pairs)


def adapter_input(directory: Path, manifest: Manifest) -> dict[str, str]:
    """The manifest record of an adapter that serves as input."""
    from loram_cli.lora.adapter import WEIGHTS_NAME
    from loram_cli.runs.digests import file_digest

    return {
        "path": str(directory),
        "key": manifest.key,
        "weights": file_digest(directory / WEIGHTS_NAME),
    }


def _recover_pair(module: str, pair: "LoraPair", base: _Base) -> "LoraPair":
    import torch

    from loram_cli.lora.adapter import LoraPair
    from loram_cli.lora.scatter import gather, scatter_columns, scatter_rows

    full_rows, full_columns = base.full_shape(module)
    rows, columns = base.kept(module)
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
