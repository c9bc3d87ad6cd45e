"""Recover: LoRA factors of the pruned model, scattered to the full model's shapes."""

from dataclasses import replace

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.sources import copy_companions, copy_template, hub_id
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.lora.wrapped import for_wrapper, read_adapter, read_adapter_shapes
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.core.full_shapes import FullShapes, recover_adapter
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.core.lineage import adapter_record, check_base, warn_of_other_template
from loram_cli.stages.core.plan import StagePlan, check_out_of_tree, make_plan
from loram_cli.stages.core.results import RecoverResult, TrainResult, result_of, training_cost
from loram_cli.stages.core.steps import checkpoint_directory
from loram_cli.stages.recover.foreign import is_foreign, no_record, open_foreign
from loram_cli.stages.recover.scale import check_scalable, fit_scale, scaled
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
    if spec.fit_scale:
        check_scalable(work.manifest)
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
        scale = 1.0
        losses: dict[float, float] = {}
        if spec.fit_scale:
            scale, losses = fit_scale(spec, work, stage.path, reporter)
            scaled(full, scale).write(stage.path)
        copy_companions(spec.model, stage.path)
        copy_template(spec.adapter, stage.path)
        return stage.commit(
            RecoverResult(
                modules=len(full.pairs),
                small_params=_params(small),
                full_params=_params(full),
                unchanged=unchanged,
                scale=scale,
                scale_losses={f"{tried:.4g}": round(loss, 4) for tried, loss in losses.items()},
                training=training_cost(work.manifest),
            )
        )


def _target_names(adapter: LoraAdapter) -> list[str] | str:
    """Targets as another trainer chose them, in an order that is the same each time."""
    targets = adapter.config["target_modules"]
    if targets == "all-linear":
        return sorted({name.rpartition(".")[2] for name in adapter.pairs})
    return targets if isinstance(targets, str) else sorted(targets)


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
