"""Train: LoRA on the pruned (or aligned) model, or on any base, by one of three objectives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loram_cli.reporting import NullReporter, Reporter
from loram_cli.runs.processes import is_main_process, process_count
from loram_cli.stages.core.lifecycle import (
    StageResult,
    check_out_of_tree,
    check_positive,
    stage_run,
)
from loram_cli.stages.core.lineage import (
    adapter_targets,
    check_start,
    describe_source,
    trained_layout,
)
from loram_cli.stages.core.plan import StagePlan, check_model, count_examples, make_plan
from loram_cli.stages.core.templates import warn_of_other_template
from loram_cli.stages.fit.launchers import as_launched
from loram_cli.stages.fit.run import (
    check_fit,
    finish_fit,
    fit_device,
    plan_together,
    prepare_tracking,
    training_setup,
    warn_of_memory,
)
from loram_cli.stages.prune.budgets import smaller_trainings
from loram_cli.stages.train.objectives import loader, own_settings, prepare, total_bytes

# Headlines of the loss curves.
_TITLES = {
    "sft": "LoRA training",
    "dpo": "Preference training (DPO)",
    "grpo": "Training on verifiable rewards (GRPO)",
}


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How to train; the defaults are the paper's.

    Attributes:
        source: The model's directory: pruned, aligned, or a base.
        out: Where the adapter goes.
        data: Instructions (sft), preferences (dpo) or word problems (grpo): a ``.jsonl`` file, a
            data set id, or ``demo:NAME``.
        objective: ``sft`` learns given answers; ``dpo`` to prefer one answer to another; ``grpo``
            draws answers and learns from those that are right.
        from_adapter: Go on from this adapter of the same model; it is then also the reference.
        eval_data: Held-out data; without it some of ``data`` are held out.
        eval_examples: How many to hold out.
        max_length: Tokens per example.
        rank: r.
        alpha: The update is scaled by alpha / r.
        dropout: LoRA dropout; None for 0.05 with sft, and none with the others.
        targets: Module names; empty for every decoder linear and an untied head.
        quantize: ``nf4`` holds the frozen model in 4 bits (QLoRAM).
        learning_rate: Peak of the cosine schedule.
        steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up.
        batch: Examples per step: answers, pairs, or drawn completions.
        micro_batch: Examples per forward pass.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between evaluations.
        loss_on: ``answer`` alone, or ``all`` tokens.
        beta: Of dpo, how much the distance to the reference costs (None: 0.1); of grpo, the weight
            of the KL divergence from it (None: 0, without reference).
        generations: Completions that grpo draws per question; None for 8.
        max_completion_length: Their tokens at most; None for 256, or half of ``max_length``.
        temperature: They are drawn at it; None for 1.
        gradient_checkpointing: Trade time for activation memory.
        cross_entropy: ``chunked`` never holds all logits, ``full`` is transformers' own loss.
        attention: ``sdpa`` of torch, ``flash`` of the flash-attn package, or ``eager``; ``auto``
            leaves the choice to transformers.
        optimizer: ``adamw``, or ``paged_adamw_8bit`` with a quarter of its state (GPU alone).
        precision: ``bf16`` or ``fp32``; ``auto`` is bf16 on a GPU that has it.
        report_to: Trackers that get the losses as well: ``tensorboard``, ``wandb``.
        seed: Decides order, split and dropout.
        device: Where to run; a GPU when there is one.
        fsdp: Share the model out among the launcher's processes.
        force: Replace an existing output.
    """

    source: Path
    out: Path
    data: str
    objective: Literal["sft", "dpo", "grpo"] = "sft"
    from_adapter: Path | None = None
    eval_data: str | None = None
    eval_examples: int = 64
    max_length: int = 512
    rank: int = 8
    alpha: int = 16
    dropout: float | None = None
    targets: tuple[str, ...] = ()
    quantize: Literal["nf4"] | None = None
    learning_rate: float = 1e-5
    steps: int = 400
    warmup_steps: int = 100
    batch: int = 128
    micro_batch: int = 4
    save_steps: int = 50
    eval_steps: int = 50
    loss_on: Literal["answer", "all"] = "answer"
    beta: float | None = None
    generations: int | None = None
    max_completion_length: int | None = None
    temperature: float | None = None
    gradient_checkpointing: bool = False
    cross_entropy: Literal["full", "chunked"] = "chunked"
    attention: Literal["auto", "sdpa", "flash", "eager"] = "auto"
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = 42
    device: str | None = None
    fsdp: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "max_length", "rank", "alpha")
        check_fit(self)
        for name, value in own_settings(self).items():
            # What is not given stands in the manifest as what it means.
            object.__setattr__(self, name, value)


def plan(spec: TrainSpec, reporter: Reporter, *, count: bool = False) -> StagePlan:
    """Check everything that can be known before a tensor is read.

    Args:
        spec: How to train.
        reporter: Told of oddities in the data.
        count: Read the data too, and count what is in it.

    Raises:
        LoramError: The source is no whole model, the disk is too full, or the data is unusable.
        UsageError: A LoRA target that the model does not have.
    """
    from loram_cli.memory.account import count_lora_params
    from loram_cli.memory.training import training_memory
    from loram_cli.modeling.load import default_device
    from loram_cli.training.adapters import lora_targets
    from loram_cli.training.loop.options import resolve_precision

    spec = as_launched(spec)
    check_out_of_tree(spec.out, *filter(None, (spec.source, spec.from_adapter)))
    prepare_tracking(spec)
    config, family, index = check_model(spec.source)
    source, base, carried = describe_source(spec.source)
    warn_of_other_template(source, base, reporter)
    tied = family.geometry(config).tied_embeddings
    wanted = spec.targets
    if spec.from_adapter is not None and not wanted:
        wanted = adapter_targets(spec.from_adapter)
    targets = lora_targets(
        family, tied_embeddings=tied, reporter=NullReporter(), targets=wanted or None
    )
    inputs = {"source": source}
    if spec.from_adapter is not None:
        inputs["adapter"] = check_start(spec, source, carried["keep"], targets)
    device = spec.device or default_device()
    setup = training_setup(
        spec,
        targets,
        config,
        device=device,
        precision=resolve_precision(spec.precision, device),
    )
    memory = training_memory(family, config, setup)
    lora_params = count_lora_params(family, config, spec.rank, targets)
    figures: dict[str, Any] = {"params": index.num_params, "lora_params": lora_params}
    figures |= {"steps": spec.steps, "batch": spec.batch}
    if count:
        load = loader(spec, None, reporter)
        figures["examples"] = count_examples(spec.data, load)
        if figures["examples"]:
            passes = spec.steps * spec.batch / (spec.generations or 1)
            figures["epochs"] = round(passes / figures["examples"], 2)
        if spec.eval_data is not None:
            figures["eval_examples"] = count_examples(spec.eval_data, load)
    reads = (spec.source, spec.from_adapter, spec.data, spec.eval_data)
    return make_plan(
        "train",
        spec,
        inputs,
        # The adapter, and up to three checkpoints of it with the optimizer's moments.
        disk_bytes=4 * 4 * lora_params + 3 * memory.optimizer * setup.processes,
        reads=tuple(map(str, filter(None, reads))),
        base=base,
        **carried,
        memory_bytes=total_bytes(spec, memory, family, config, setup),
        processes=process_count(),
        figures=figures,
    )


def run(spec: TrainSpec, reporter: Reporter) -> StageResult:
    """Fit an adapter and write it with its loss curve.

    Raises:
        LoramError: See :func:`plan`; also a loss that is not finite.
    """
    spec = as_launched(spec)
    device = fit_device(spec, reporter)
    planned = plan_together(plan, spec, reporter)
    with stage_run("train", spec, planned.inputs, spec.source, resumable=True) as stage:
        if stage.finished is not None:
            return stage.finished
        _tell_start(spec, reporter)
        warn_of_memory(planned, smaller_trainings(spec), device, reporter)
        results = _train(spec, device, stage.path, stage.restart_meter, reporter)
        return stage.commit(
            results, base=planned.base, keep=planned.keep, sparsity=planned.sparsity
        )


def _train(
    spec: TrainSpec, device: str, path: Path, start_meter: Callable[[], None], reporter: Reporter
) -> dict[str, Any]:
    import peft  # noqa: F401 - imported here so that its memory is not charged to training
    import transformers

    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import CheckpointIndex, read_config
    from loram_cli.modeling.load import load_tokenizer
    from loram_cli.training.adapters import lora_targets, save_adapter
    from loram_cli.training.data.documents import source_layout

    config = read_config(spec.source)
    family = family_for(config, str(spec.source))
    targets = spec.targets
    if spec.from_adapter is not None:
        targets = adapter_targets(spec.from_adapter)
    targets = lora_targets(
        family,
        tied_embeddings=family.geometry(config).tied_embeddings,
        reporter=reporter,
        targets=targets or None,
    )
    prepared = prepare(spec, load_tokenizer(spec.source), reporter)
    # Now, and not at the end: the file may be gone by then.
    layout = trained_layout(spec.from_adapter) or source_layout(spec.data)
    if spec.objective != "sft":
        import loram_cli.training.trl_trainers  # noqa: F401 - as peft
    transformers.set_seed(spec.seed)
    start_meter()
    model = _load(spec, family, device, targets, reporter).train()
    fitted = prepared.fit(model, path)
    factors = None
    if spec.fsdp:
        from loram_cli.modeling.sharding import whole_trained_weights

        factors = whole_trained_weights(model)
    if is_main_process():
        save_adapter(model, path, weights=factors)
    losses = finish_fit(fitted, path, _TITLES[spec.objective])
    return {
        "objective": spec.objective,
        "layout": layout,
        "steps": spec.steps,
        "examples": prepared.examples,
        "targets": list(targets),
        "trained_on_params": CheckpointIndex.open(spec.source).num_params,
        "lora_params": fitted.trainable_params,
        **losses,
    }


def _tell_start(spec: TrainSpec, reporter: Reporter) -> None:
    if spec.from_adapter is not None:
        reporter.note(f"going on from the adapter {spec.from_adapter}")
    elif spec.objective != "sft":
        reporter.note(
            f"{spec.objective} starts from the model as it is; after supervised tuning, "
            "pass its adapter as --from-adapter"
        )


def _load(
    spec: TrainSpec, family: Any, device: str, targets: tuple[str, ...], reporter: Reporter
) -> Any:
    """The frozen model with LoRA factors on it."""
    from loram_cli.modeling.load import load_causal_lm
    from loram_cli.modeling.quantize import nf4_config, prepare_for_training
    from loram_cli.training.loop.options import weights_dtype

    dtype = weights_dtype(spec.precision, device)
    if spec.fsdp:
        from loram_cli.modeling.sharding import SharedModel

        shared = SharedModel(
            spec.source,
            dtype=dtype,
            device=device,
            attention=spec.attention,
            nf4=spec.quantize == "nf4",
        )
        model = _with_factors(shared.model, spec, targets)
        shared.load(model, reporter)
        return model
    quantization = nf4_config(dtype, skip_modules=(family.lm_head,)) if spec.quantize else None
    model = load_causal_lm(
        spec.source,
        dtype=dtype,
        device=device,
        attention=spec.attention,
        quantization_config=quantization,
    )
    if spec.quantize:
        prepare_for_training(model)
    return _with_factors(model, spec, targets)


def _with_factors(model: Any, spec: TrainSpec, targets: tuple[str, ...]) -> Any:
    from loram_cli.training.adapters import attach_lora, continue_lora, lora_config

    dropout = float(spec.dropout or 0)
    if spec.from_adapter is not None:
        return continue_lora(model, spec.from_adapter, dropout=dropout)
    lora = lora_config(targets, rank=spec.rank, alpha=spec.alpha, dropout=dropout)
    return attach_lora(model, lora, seed=spec.seed)
