"""Recover: LoRA factors of the pruned model, scattered to the full model's shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loram_cli.arch.experts import AdaptedWeight
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.sources import copy_companions, copy_template, hub_id
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.lora.scatter import gather, scatter_columns, scatter_experts, scatter_rows
from loram_cli.lora.wrapped import for_wrapper, read_adapter, read_adapter_shapes
from loram_cli.pruning.groups import LayerKeep, kept_layers, layer_keeps
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.core.lineage import adapter_record, check_base, warn_of_other_template
from loram_cli.stages.core.plan import StagePlan, check_out_of_tree, make_plan
from loram_cli.stages.core.results import RecoverResult, TrainResult, result_of, training_cost
from loram_cli.stages.core.steps import checkpoint_directory
from loram_cli.stages.recover.foreign import is_foreign, no_record, open_foreign
from loram_cli.stages.recover.spec import MergeSpec, RecoverSpec
from loram_cli.stages.recover.work import RecoverWork

__all__ = ["RecoverSpec", "plan", "run"]


def open_inputs(spec: RecoverSpec | MergeSpec, stage: str, otherwise: str) -> RecoverWork:
    """Open base and adapter, and see that they belong together.

    Raises:
        LoramError: They do not fit.
    """
    check_out_of_tree(spec.out, spec.model, spec.adapter)
    if is_foreign(spec.adapter):
        raise no_record(spec.adapter)
    manifest = Manifest.read(spec.adapter)
    if manifest.stage != stage:
        raise LoramError(f"{spec.adapter}: was made by '{manifest.stage}', {otherwise}")
    model = Model.open(spec.model)
    base = check_base(manifest, model, spec.adapter)
    factors, asked = spec.adapter, getattr(spec, "checkpoint", None)
    if asked is not None:
        result = result_of(manifest)
        assert isinstance(result, TrainResult)
        factors = checkpoint_directory(spec.adapter, asked, result.best_step)
    record = {**adapter_record(factors, manifest), "path": str(spec.adapter)}
    inputs = {"base": base, "adapter": record}
    return RecoverWork(model, manifest, inputs, factors, manifest.inputs.get("source", {}))


def plan(spec: RecoverSpec, reporter: Reporter, *, count: bool = False) -> StagePlan[RecoverWork]:
    """Check everything that can be known before a factor is read.

    Raises:
        LoramError: Another base, an adapter that does not fit it, or no disk.
    """
    if spec.pruned is not None:
        work = open_foreign(spec)
    else:
        work = open_inputs(spec, "train", "expected an output of 'train'")
    base = FullShapes.of(work.model, work.manifest.keep)
    small_params = full_params = 0
    shapes = read_adapter_shapes(work.factors, work.model.wrapper, work.copies)
    for small_name, (rows, columns, rank) in shapes.items():
        module = base.name_of(small_name)
        adapted = base.adapted(module)
        full_rows, full_columns = adapted.rows, adapted.columns
        kept_rows, kept_columns = base.kept(module)
        if adapted.experts:
            rank = _rank_each(module, rank, base)
        kept = (
            full_rows if kept_rows is None else len(kept_rows),
            full_columns if kept_columns is None else len(kept_columns),
        )
        if (rows, columns) != kept:
            raise LoramError(
                f"adapter module {module} is {rows} x {columns}, "
                f"what was kept of the base's weight {kept[0]} x {kept[1]}"
            )
        copies = len(base.kept_experts(module)), adapted.experts
        small_params += rank * (rows + columns) * max(1, copies[0])
        full_params += rank * (full_rows + full_columns) * max(1, copies[1])
    return make_plan(
        "recover",
        spec,
        work.inputs,
        work,
        disk_bytes=4 * full_params,
        reads=tuple(filter(None, (spec.adapter, spec.pruned, spec.model))),
        base=work.inputs["base"],
        keep=work.manifest.keep,
        sparsity=work.manifest.sparsity,
        memory_bytes=4 * (small_params + full_params),
        figures={"small_params": small_params, "full_params": full_params},
    )


def run(spec: RecoverSpec, reporter: Reporter) -> StageResult:
    """Scatter an adapter to the base's shapes and check it factor by factor.

    Raises:
        LoramError: See :func:`plan`; also a failed check.
    """
    planned = plan(spec, reporter)
    work = planned.work
    with stage_run(planned, spec, spec.adapter) as stage:
        if stage.finished is not None:
            return stage.finished
        stage.restart_meter()
        warn_of_other_template(work.trained, planned.base, reporter)
        small = read_adapter(work.factors, work.model.wrapper, work.copies)
        full = recover_adapter(small, FullShapes.of(work.model, work.manifest.keep), reporter)
        unchanged = _is_unchanged(small, full)
        name = hub_id(spec.model) or str(spec.model)
        named = {**full.config, "base_model_name_or_path": name, "inference_mode": True}
        if spec.pruned is not None:
            named |= {"revision": None, "target_modules": _target_names(full)}
        full = replace(full, config=named)
        if work.model.wrapper is not None:
            linears = [name.removesuffix(".weight") for name in work.model.linear_names]
            full = for_wrapper(full, work.model.wrapper, linears)
        full.write(stage.path)
        copy_companions(spec.model, stage.path)
        copy_template(spec.adapter, stage.path)
        return stage.commit(
            RecoverResult(
                modules=len(full.pairs),
                small_params=_params(small),
                full_params=_params(full),
                unchanged=unchanged,
                training=training_cost(work.manifest),
            )
        )


def _target_names(adapter: LoraAdapter) -> list[str] | str:
    """Targets as another trainer chose them, in an order that is the same each time."""
    targets = adapter.config["target_modules"]
    if targets == "all-linear":
        return sorted({name.rpartition(".")[2] for name in adapter.pairs})
    return targets if isinstance(targets, str) else sorted(targets)


@dataclass(frozen=True)
class FullShapes:
    """Where an adapter's factors belong: the base's shapes, and what was kept of them.

    Attributes:
        model: The base.
        shapes: Of its tensors.
        keep: What was kept, by layer.
    """

    model: Model
    shapes: dict[str, tuple[int, ...]]
    keep: dict[int, LayerKeep]
    layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: Model, keep: Mapping[str, Any]) -> "FullShapes":
        """Those of a base, and what a manifest says was kept of it."""
        family = model.family
        shapes = family.tensor_shapes(model.config)
        shapes.setdefault(f"{family.lm_head}.weight", shapes[f"{family.embedding}.weight"])
        return cls(model, shapes, layer_keeps(keep), kept_layers(keep))

    def name_of(self, module: str) -> str:
        """The base's name of a module of the small model, whose layers may count otherwise.

        Raises:
            LoramError: It is of a layer that the small model does not have.
        """
        family = self.model.family
        layer, rest = family.layer_of(module)
        if layer is None or self.layers is None:
            return module
        if layer >= len(self.layers):
            raise LoramError(
                f"adapter module {module}: the model that it was trained on has "
                f"{len(self.layers)} layers"
            )
        return f"{family.layer_prefix(self.layers[layer])}{rest}"

    def adapted(self, module: str) -> AdaptedWeight:
        """The base's weight that a module's factors change.

        Raises:
            LoramError: The base has no such module.
        """
        found = self.model.family.adapted_weight(module, self.shapes)
        if found is None:
            raise LoramError(f"adapter module {module} does not exist in the base")
        return found

    def kept_experts(self, module: str) -> tuple[int, ...]:
        """Of a module that holds factors of experts, those that stayed; else empty."""
        adapted = self.adapted(module)
        found = self.model.family.tensor_named(adapted.tensor)
        if not adapted.experts or found is None:
            return ()
        keep = self.keep.get(found[0])
        everything = tuple(range(adapted.experts))
        return everything if keep is None or keep.experts is None else keep.experts

    def kept(self, module: str) -> tuple[list[int] | None, list[int] | None]:
        """Rows and columns that were kept of a module's weight; None for all."""
        found = self.model.family.module_named(module)
        if found is None or found[0] not in self.keep:
            return None, None
        layer, linear = found
        keep, geometry = self.keep[layer], self.model.geometry.layers[layer]
        return keep.rows(linear, geometry), keep.columns(linear, geometry)


def recover_adapter(small: LoraAdapter, base: FullShapes, reporter: Reporter) -> LoraAdapter:
    """Bring every factor of a pruned model's adapter to the base's shapes.

    Raises:
        LoramError: A module or shape is not the base's, or the check of the result fails.
    """
    pairs = {}
    with reporter.progress("scatter", len(small.pairs), "module") as progress:
        for module, pair in small.pairs.items():
            name = base.name_of(module)
            pairs[name] = _recover_pair(name, pair, base)
            progress.advance()
    return replace(small, pairs={**pairs, **_fresh_pairs(pairs, base)})


def _fresh_pairs(pairs: dict[str, LoraPair], base: FullShapes) -> dict[str, LoraPair]:
    """Factors of the layers that the small model lacked: new ones, which change nothing.

    As PEFT starts them, so that exact steps on the full model can go on from there.
    """
    if base.layers is None:
        return {}
    family = base.model.family
    ranks: dict[str, LoraPair] = {}
    for name, pair in pairs.items():
        prefix, rest = family.split_layer(name)
        if prefix:
            ranks[rest] = pair
    experts = family.experts.factor_modules if family.experts is not None else {}
    fresh: dict[str, LoraPair] = {}
    for i, layer in enumerate(base.model.geometry.layers):
        for module in (*(linear.name for linear in family.layer_modules(layer)), *experts):
            name = f"{family.layer_prefix(i)}{module}"
            adapted = family.adapted_weight(name, base.shapes)
            if i in base.layers or module not in ranks or adapted is None:
                continue
            like = ranks[module].lora_a
            rows, columns = adapted.rows, adapted.columns
            generator = torch.Generator().manual_seed(len(fresh))
            bound = columns**-0.5
            lora_a = (torch.rand(len(like), columns, generator=generator) * 2 - 1) * bound
            lora_b = torch.zeros(rows, len(like), dtype=like.dtype)
            fresh[name] = LoraPair(lora_a.to(like.dtype), lora_b)
    return fresh


def _recover_pair(module: str, pair: LoraPair, base: FullShapes) -> LoraPair:
    adapted = base.adapted(module)
    if adapted.experts:
        return _recover_experts(module, pair, base)
    full_rows, full_columns = adapted.rows, adapted.columns
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
    # Equal within the kept indices, and nothing outside them: as many non-zeros as before.
    same = all(
        torch.equal(part, was) and int(now.count_nonzero()) == int(was.count_nonzero())
        for part, now, was in (
            (gather(lora_b, rows, None), lora_b, pair.lora_b),
            (gather(lora_a, None, columns), lora_a, pair.lora_a),
        )
    )
    if not same:
        raise LoramError(
            f"adapter module {module}: the recovered factors do not match the small ones"
        )
    return LoraPair(lora_a, lora_b)


def _recover_experts(module: str, pair: LoraPair, base: FullShapes) -> LoraPair:
    """Factors of the experts that stayed, at their places among all; zeros for the others."""
    experts = base.adapted(module).experts
    try:
        full = scatter_experts(pair, base.kept_experts(module), experts)
    except ValueError as error:
        raise LoramError(
            f"adapter module {module} does not fit the keep indices: {error}"
        ) from error
    for was, now in ((pair.lora_a, full.lora_a), (pair.lora_b, full.lora_b)):
        if int(was.count_nonzero()) != int(now.count_nonzero()):
            raise LoramError(
                f"adapter module {module}: the recovered factors do not match the small ones"
            )
    return full


def _rank_each(module: str, rows: int, base: FullShapes) -> int:
    """The rank of each expert's factors, from the rows that they have together.

    Raises:
        LoramError: They are not of the experts that stayed.
    """
    count = len(base.kept_experts(module))
    if rows % count:
        raise LoramError(f"adapter module {module} has no factors of {count} experts")
    return rows // count


def _is_unchanged(small: LoraAdapter, full: LoraAdapter) -> bool:
    """Whether the factors already had the base's shapes, so that recovery changed nothing."""
    return small.pairs.keys() == full.pairs.keys() and all(
        torch.equal(pair.lora_a, full.pairs[module].lora_a)
        and torch.equal(pair.lora_b, full.pairs[module].lora_b)
        for module, pair in small.pairs.items()
    )


def _params(adapter: LoraAdapter) -> int:
    return sum(pair.lora_a.numel() + pair.lora_b.numel() for pair in adapter.pairs.values())
