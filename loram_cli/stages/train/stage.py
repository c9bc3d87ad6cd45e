"""Train: LoRA on the pruned (or aligned) model, or on any base, by one of the objectives."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import peft  # noqa: F401 - imported here so that its memory is not charged to training
import transformers

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Family
from loram_cli.arch.targets import lora_targets
from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.lora.wrapped import for_wrapper, read_adapter
from loram_cli.memory.account import count_lora_params, count_params
from loram_cli.memory.setup import Packing, TrainingSetup, usual_attention
from loram_cli.memory.streaming import StreamedMemory, streamed_training_memory
from loram_cli.memory.training import TrainingMemory, training_memory
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.sharding import SharedModel, whole_trained_weights
from loram_cli.modeling.skeleton import SkeletonModel, fill_whole
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process, process_count
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.core.lineage import (
    Source,
    adapter_targets,
    check_start,
    describe_source,
    trained_layout,
    warn_of_oddities,
    warn_of_other_template,
)
from loram_cli.stages.core.plan import StagePlan, check_out_of_tree, make_plan
from loram_cli.stages.core.results import TrainResult
from loram_cli.stages.core.steps import put_steps, take_step
from loram_cli.stages.fit.launchers import as_launched
from loram_cli.stages.fit.run import (
    check_device,
    finish_fit,
    fit_device,
    plan_together,
    warn_of_memory,
)
from loram_cli.stages.fit.spec import smaller_trainings
from loram_cli.stages.train.data import (
    counted,
    prepare,
    save_template,
    training_tokenizer,
    tried,
)
from loram_cli.stages.train.objectives.objective import Prepared
from loram_cli.stages.train.recovered import open_base, recovered_losses
from loram_cli.stages.train.spec import TrainSpec
from loram_cli.training.adapters import attach_lora, continue_lora, lora_config, save_adapter
from loram_cli.training.data.documents import source_layout
from loram_cli.training.data.packing import usable_packing
from loram_cli.training.data.template_names import named_template
from loram_cli.training.loop.options import FitResult, best_step, resolve_precision, weights_dtype
from loram_cli.training.streamed import streamed_within

__all__ = ["TrainSpec", "plan", "run"]

_Skeleton = TypeVar("_Skeleton", bound=SkeletonModel)


@dataclass(frozen=True)
class TrainWork:
    """The model to train on, opened, and the modules that get factors."""

    model: Model
    targets: tuple[str, ...]


def _check_scoring(source: Source) -> None:
    if not source.keep:
        raise UsageError(
            "--score-recovered is for a pruned model, and this one has the full model's shapes",
            "its held-out loss is the full model's: leave --score-recovered out",
        )
    open_base(source.base)


def plan(spec: TrainSpec, reporter: Reporter, *, count: bool = False) -> StagePlan[TrainWork]:
    """Check everything that can be known before a tensor is read.

    Raises:
        LoramError: The source is no whole model, the disk is too full, or the data is unusable.
        UsageError: A LoRA target that the model does not have.
    """
    spec = as_launched(spec.settled())
    if spec.stream and process_count() > 1:
        raise UsageError(
            f"--stream runs in one process, and {process_count()} were started",
            "start it without a launcher, or pass --fsdp to share the model out",
        )
    check_out_of_tree(spec.out, *filter(None, (spec.source, spec.from_adapter)))
    device = check_device(spec)
    if spec.chat_template is not None:
        named_template(spec.chat_template)
    model = Model.open(spec.source)
    model.check_whole()
    warn_of_oddities(model, reporter)
    _check_low_bit(spec, model)
    source = describe_source(model)
    warn_of_other_template(source.record, source.base, reporter)
    wanted = spec.targets
    if spec.from_adapter is not None and not wanted:
        wanted = adapter_targets(spec.from_adapter)
    targets = lora_targets(
        model.family, tied_embeddings=model.tied_embeddings, targets=wanted or None
    )
    told = spec
    spec = _in_precision(spec, model, device)
    inputs: dict[str, Mapping[str, Any]] = {"source": source.record}
    if spec.from_adapter is not None:
        values = {"rank": spec.rank, "alpha": spec.alpha, "rslora": spec.rslora}
        inputs["adapter"] = check_start(spec.from_adapter, source, values, targets)
    usable_packing(spec.packing, model.family, "")
    prepared = tried(spec, reporter) if count else None
    setup = _setup(spec, targets, model.config, device, prepared)
    memory = _memory(spec, model.family, model.config, setup)
    lora_params = count_lora_params(model.family, model.config, spec.rank, targets)
    figures: dict[str, Any] = {"params": model.num_params, "lora_params": lora_params}
    figures |= {"steps": spec.steps, "epochs": spec.epochs, "batch": spec.batch}
    if prepared is not None:
        figures |= counted(spec, prepared)
        figures["tokens_per_pass"] = setup.tokens
    if spec.score_recovered:
        _check_scoring(source)
    return make_plan(
        "train",
        told,
        inputs,
        TrainWork(model, targets),
        # The adapter, up to three checkpoints of it with the optimizer's moments, and what is kept
        # of all of them, once more while it is copied into the output.
        disk_bytes=4 * lora_params * (4 + 2 * (spec.keep_checkpoints + 1))
        + 3 * memory.optimizer * setup.processes,
        reads=tuple(filter(None, (spec.source, spec.from_adapter, spec.data, spec.eval_data))),
        base=source.base,
        keep=source.keep,
        sparsity=source.sparsity,
        memory_bytes=_total_bytes(spec, model, setup),
        processes=process_count(),
        figures=figures,
    )


def _check_low_bit(spec: TrainSpec, model: Model) -> None:
    if model.low_bit is None:
        return
    for asked, value in (("--quantize nf4", spec.quantize), ("--fsdp", spec.fsdp)):
        if value:
            raise UsageError(
                f"{asked} does not go with {model.directory}: its weights are held in "
                f"{model.low_bit.bits} bits as they are",
                f"leave out {asked}",
            )


def foresee(spec: TrainSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """What training on a model with a config would take, on a GPU; it need not be there."""
    family = family_for(config, "the model")
    tied = family.geometry(config).tied_embeddings
    targets = lora_targets(family, tied_embeddings=tied, targets=spec.targets or None)
    setup = replace(_setup(replace(spec, precision="bf16"), targets, config, "cpu"), device="cuda")
    memory = _memory(spec, family, config, setup)
    more_bytes = spec.chosen_objective.more_bytes(spec, memory, family, config, setup)
    return {
        "params": count_params(family, config).total,
        "lora_params": count_lora_params(family, config, spec.rank, targets),
        "steps": spec.steps,
        "epochs": spec.epochs,
        "batch": spec.batch,
        "memory_bytes": memory.total + more_bytes,
    }


def run(spec: TrainSpec, reporter: Reporter) -> StageResult:
    """Fit an adapter and write it with its loss curve.

    Raises:
        LoramError: See :func:`plan`; also a loss that is not finite.
    """
    spec = as_launched(spec.settled())
    device = fit_device(spec, reporter)
    planned = plan_together(plan, spec, reporter)
    with stage_run(planned, spec, spec.source, resumable=True) as stage:
        if stage.finished is not None:
            return stage.finished
        work = planned.work
        # What the manifest records is what was asked for.
        spec = _in_precision(spec, work.model, device)
        _tell_start(spec, work, reporter)
        tokenizer = training_tokenizer(spec)
        prepared = prepare(spec, tokenizer, reporter)
        setup = _setup(spec, work.targets, work.model.config, device, prepared)
        needed = replace(planned, memory_bytes=_total_bytes(spec, work.model, setup))
        warn_of_memory(needed, smaller_trainings(spec), device, reporter)
        result = _train(spec, planned, prepared, device, stage.path, stage.restart_meter, reporter)
        if is_main_process():
            save_template(tokenizer, stage.path)
            _name_for_wrapper(work.model, stage.path)
        return stage.commit(result)


def _in_precision(spec: TrainSpec, model: Model, device: str) -> TrainSpec:
    """The spec with the precision that ``auto`` means for a model on a device."""
    params = count_params(model.family, model.config).total
    return replace(spec, precision=resolve_precision(spec.precision, device, params))


def _total_bytes(spec: TrainSpec, model: Model, setup: TrainingSetup) -> int:
    """What training takes at its peak, the objective's own share included."""
    family, config = model.family, model.config
    memory = _memory(spec, family, config, setup)
    return memory.total + spec.chosen_objective.more_bytes(spec, memory, family, config, setup)


def _setup(
    spec: TrainSpec,
    targets: tuple[str, ...],
    config: Mapping[str, Any],
    device: str,
    prepared: Prepared | None = None,
) -> TrainingSetup:
    """What the memory account has to know of a spec, and of the data where it is at hand.

    The spec's precision is no longer ``auto``: see :func:`_in_precision`.
    """
    assert spec.precision != "auto"
    sequences = spec.micro_batch * spec.chosen_objective.sequences_per_example
    longest = tuple(heapq.nlargest(sequences, prepared.lengths)) if prepared else ()
    packing: Packing = "off"
    if spec.objective == "sft":
        packing = usable_packing(spec.packing, family_for(config, "the model"), spec.attention)
    return TrainingSetup(
        rank=spec.rank,
        targets=targets,
        dropout=spec.dropout or 0.0,
        quantize=spec.quantize,
        micro_batch=sequences,
        length=longest[0] if longest else spec.max_length,
        longest=longest,
        packing=packing,
        gradient_checkpointing=spec.gradient_checkpointing,
        attention=usual_attention(config) if spec.attention == "auto" else spec.attention,
        cross_entropy=spec.cross_entropy,
        optimizer=spec.optimizer,
        precision=spec.precision,
        device="cpu" if device == "cpu" else "cuda",
        processes=process_count() if spec.fsdp else 1,
    )


def _memory(
    spec: TrainSpec, family: Family, config: Mapping[str, Any], setup: TrainingSetup
) -> TrainingMemory:
    if not spec.stream:
        return training_memory(family, config, setup)
    return _streamed_memory(spec, family, config, setup)


def _streamed_memory(
    spec: TrainSpec, family: Family, config: Mapping[str, Any], setup: TrainingSetup
) -> StreamedMemory:
    micro_batches = spec.batch // spec.micro_batch
    offload = spec.offload_activations
    return streamed_training_memory(
        family, config, setup, micro_batches, offload_activations=offload
    )


def _train(
    spec: TrainSpec,
    planned: StagePlan[TrainWork],
    prepared: Prepared,
    device: str,
    path: Path,
    start_meter: Callable[[], None],
    reporter: Reporter,
) -> TrainResult:
    work = planned.work
    # Now, and not at the end: the file may be gone by then.
    layout = trained_layout(spec.from_adapter) or source_layout(spec.data)
    objective = spec.chosen_objective
    objective.warm_up()
    transformers.set_seed(spec.seed)
    start_meter()
    fitted = _fit(spec, work, prepared, device, path, reporter)
    steps = put_steps(path, reporter) if is_main_process() else []
    best = fitted.best_step
    if spec.score_recovered and is_main_process():
        base = open_base(planned.base)
        scores = recovered_losses(
            base, planned.keep, path, steps, prepared.eval_rows, device, reporter
        )
        fitted = replace(fitted, history=(*fitted.history, *scores))
        best = best_step(scores, "recovered")
    kept = fitted.steps
    if spec.keep == "best" and best is not None and best in steps:
        take_step(path, best)
        kept = best
    return TrainResult(
        objective=spec.objective,
        layout=layout,
        steps=fitted.steps,
        examples=prepared.examples,
        targets=work.targets,
        trained_on_params=work.model.num_params,
        lora_params=fitted.trainable_params,
        best_step=best,
        kept_step=kept,
        tokens=fitted.tokens,
        computed_tokens=fitted.computed_tokens,
        recovered_loss_before=_recovered_loss(fitted, 0),
        recovered_loss_after=_recovered_loss(fitted, kept),
        **finish_fit(fitted, path, objective.title, kept),
    )


def _fit(
    spec: TrainSpec,
    work: TrainWork,
    prepared: Prepared,
    device: str,
    path: Path,
    reporter: Reporter,
) -> FitResult:
    """Train, and write the adapter of the last step; the model is gone afterwards."""
    if spec.stream:
        skeleton = _skeleton(SkeletonModel, spec, work, device)
        model = _with_factors(skeleton.model, spec, work)
        setup = _setup(spec, work.targets, work.model.config, device)
        memory = _streamed_memory(spec, work.model.family, work.model.config, setup)
        offload = spec.offload_activations
        with streamed_within(
            skeleton, model, memory, reporter, offload_activations=offload, directory=path
        ) as passes:
            fitted = prepared.fit(model, path, streamed=passes)
    else:
        model = _load(spec, work, device, reporter).train()
        fitted = prepared.fit(model, path)
    factors = whole_trained_weights(model) if spec.fsdp else None
    if is_main_process():
        save_adapter(model, path, weights=factors)
    return fitted


def _name_for_wrapper(model: Model, path: Path) -> None:
    """Give the factors of a text model inside a multimodal one the names that PEFT expects."""
    if model.wrapper is not None:
        linears = [name.removesuffix(".weight") for name in model.linear_names]
        for_wrapper(read_adapter(path, None), model.wrapper, linears).write(path)


def _recovered_loss(fitted: FitResult, step: int) -> float | None:
    rows = (row for row in fitted.history if row.split == "recovered" and row.step == step)
    return next((round(row.loss, 4) for row in rows), None)


def _tell_start(spec: TrainSpec, work: TrainWork, reporter: Reporter) -> None:
    if work.model.tied_embeddings and not spec.targets and spec.from_adapter is None:
        head = work.model.family.lm_head_target
        reporter.note(f"embeddings are tied: {head} gets no LoRA factors")
    if spec.from_adapter is not None:
        reporter.note(f"resuming from the adapter {spec.from_adapter}")
    elif spec.chosen_objective.follows_sft:
        reporter.note(
            f"{spec.objective} starts from the model as it is; after supervised tuning, "
            "pass its adapter as --from-adapter"
        )


def _load(spec: TrainSpec, work: TrainWork, device: str, reporter: Reporter) -> Any:
    """The frozen model with LoRA factors on it."""
    if spec.fsdp:
        shared = _skeleton(SharedModel, spec, work, device)
        model = _with_factors(shared.model, spec, work)
        shared.load(model, reporter)
        return model
    if spec.quantize or work.model.low_bit is not None:
        skeleton = _skeleton(SkeletonModel, spec, work, device)
        model = _with_factors(skeleton.model, spec, work)
        fill_whole(skeleton, reporter)
        return model
    dtype = weights_dtype(spec.precision, device)
    model = load_causal_lm(work.model, dtype=dtype, device=device, attention=spec.attention)
    return _with_factors(model, spec, work)


def _skeleton(kind: type[_Skeleton], spec: TrainSpec, work: TrainWork, device: str) -> _Skeleton:
    """The frozen model before its weights are there, in the form that is asked for."""
    return kind(
        work.model,
        dtype=weights_dtype(spec.precision, device),
        device=device,
        attention=spec.attention,
        nf4=spec.quantize == "nf4",
    )


def _with_factors(model: Any, spec: TrainSpec, work: TrainWork) -> Any:
    dropout = float(spec.dropout or 0)
    if spec.from_adapter is not None:
        return continue_lora(model, spec.from_adapter, dropout=dropout)
    lora = lora_config(
        work.targets,
        rank=spec.rank,
        alpha=spec.alpha,
        dropout=dropout,
        rslora=spec.rslora,
        experts=work.model.family.experts,
    )
    return attach_lora(model, lora, seed=spec.seed)
