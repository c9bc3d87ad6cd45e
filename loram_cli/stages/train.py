"""Train: LoRA on the pruned (or aligned) model, or on any base for comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.processes import is_main_process, process_count
from loram_cli.stages.common import StageResult, check_out_of_tree, check_positive, stage_run
from loram_cli.stages.fitting import (
    as_launched,
    check_fit,
    finish_fit,
    fit_device,
    fit_options,
    plan_together,
    prepare_tracking,
    training_setup,
)
from loram_cli.stages.planning import StagePlan, check_model, count_examples, make_plan
from loram_cli.stages.templates import warn_of_other_template


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How to train; the defaults are the paper's.

    Attributes:
        source: The model's directory: pruned, aligned, or a base.
        out: Where the adapter goes.
        data: Instructions: a ``.jsonl`` file, a data set id, or ``demo:train``.
        eval_data: Held-out instructions; without it some of ``data`` are held out.
        eval_examples: How many to hold out.
        max_length: Tokens per example.
        rank: r.
        alpha: The update is scaled by alpha / r.
        dropout: LoRA dropout.
        targets: Module names; empty for every decoder linear and an untied head.
        quantize: ``nf4`` holds the frozen model in 4 bits (QLoRAM).
        learning_rate: Peak of the cosine schedule.
        steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up.
        batch: Examples per step.
        micro_batch: Examples per forward pass.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between evaluations.
        loss_on: ``answer`` alone, or ``all`` tokens.
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
    eval_data: str | None = None
    eval_examples: int = 64
    max_length: int = 512
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
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
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout} is outside [0, 1)")


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
    from loram_cli.modeling.narrow import default_device
    from loram_cli.training.adapters import lora_targets
    from loram_cli.training.options import resolve_precision

    spec = as_launched(spec)
    check_out_of_tree(spec.out, spec.source)
    prepare_tracking(spec)
    config, family, index = check_model(spec.source)
    source, base, carried = describe_source(spec.source)
    warn_of_other_template(source, base, reporter)
    tied = family.geometry(config).tied_embeddings
    targets = lora_targets(
        family, tied_embeddings=tied, reporter=NullReporter(), targets=spec.targets or None
    )
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
        figures["examples"] = count_examples(spec.data, reporter)
        if figures["examples"]:
            figures["epochs"] = round(spec.steps * spec.batch / figures["examples"], 2)
        if spec.eval_data is not None:
            figures["eval_examples"] = count_examples(spec.eval_data, reporter)
    return make_plan(
        "train",
        spec,
        {"source": source},
        # The adapter, and up to three checkpoints of it with the optimizer's moments.
        disk_bytes=4 * 4 * lora_params + 3 * memory.optimizer * setup.processes,
        reads=tuple(filter(None, (str(spec.source), spec.data, spec.eval_data))),
        base=base,
        **carried,
        memory_bytes=memory.total,
        processes=process_count(),
        figures=figures,
    )


def run(spec: TrainSpec, reporter: Reporter) -> StageResult:
    """Fit an adapter and write it with its loss curve.

    Raises:
        LoramError: See :func:`plan`; also a loss that is not finite.
    """
    spec = as_launched(spec)
    device = fit_device(spec)
    planned = plan_together(plan, spec, reporter)
    with stage_run("train", spec, planned.inputs, spec.source, resumable=True) as stage:
        if stage.finished is not None:
            return stage.finished
        results = _train(spec, device, stage.path, stage.restart_meter, reporter)
        return stage.commit(
            results, base=planned.base, keep=planned.keep, sparsity=planned.sparsity
        )


def describe_source(source: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Digests of the model to train on, the base that it descends from, and what was kept of it.

    Nothing has to guard the zeros of a sparse model here: its weights are frozen, and LoRA's
    product is added beside them, not inside the mask.

    Raises:
        LoramError: The directory is another stage's output.
    """
    from loram_cli.checkpoint.identity import identify

    identity = {"path": str(source), **identify(source).to_mapping()}
    if not (source / MANIFEST_NAME).is_file():
        return identity, identity, {"keep": {}}
    manifest = Manifest.read(source)
    if manifest.stage not in ("prune", "align", "merge"):
        raise LoramError(f"{source}: was made by '{manifest.stage}', a model directory is wanted")
    base = identity if manifest.stage == "merge" else dict(manifest.base)
    carried = {"keep": dict(manifest.keep), "sparsity": dict(manifest.sparsity)}
    return {**identity, "key": manifest.key}, base, carried


def _train(
    spec: TrainSpec, device: str, path: Path, start_meter: Callable[[], None], reporter: Reporter
) -> dict[str, Any]:
    import peft  # noqa: F401 - imported here so that its memory is not charged to training
    import transformers

    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import CheckpointIndex, read_config
    from loram_cli.modeling.narrow import load_tokenizer
    from loram_cli.training.adapters import lora_config, lora_targets, save_adapter
    from loram_cli.training.loop import fit_lora
    from loram_cli.training.tokens import tokenize_examples

    config = read_config(spec.source)
    family = family_for(config, str(spec.source))
    targets = lora_targets(
        family,
        tied_embeddings=family.geometry(config).tied_embeddings,
        reporter=reporter,
        targets=spec.targets or None,
    )
    tokenizer = load_tokenizer(spec.source)
    train_examples, eval_examples = _split(spec, tokenizer, reporter)

    def encode(examples: list[Any]) -> list[Any]:
        whole = spec.loss_on == "all"
        return tokenize_examples(
            examples, tokenizer, spec.max_length, reporter, loss_on_prompt=whole
        )

    train_rows = encode(train_examples)
    eval_rows = encode(eval_examples) if eval_examples else []
    transformers.set_seed(spec.seed)
    lora = lora_config(targets, rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout)
    start_meter()
    model = _load(spec, family, device, lora, reporter).train()
    fitted = fit_lora(model, train_rows, eval_rows, fit_options(spec), path, reporter)
    factors = None
    if spec.fsdp:
        from loram_cli.modeling.sharding import whole_trained_weights

        factors = whole_trained_weights(model)
    if is_main_process():
        save_adapter(model, path, weights=factors)
    losses = finish_fit(fitted, path, "LoRA training")
    return {
        "steps": spec.steps,
        "examples": len(train_rows),
        "targets": list(targets),
        "trained_on_params": CheckpointIndex.open(spec.source).num_params,
        "lora_params": fitted.trainable_params,
        **losses,
    }


def _load(spec: TrainSpec, family: Any, device: str, lora: Any, reporter: Reporter) -> Any:
    """The frozen model with LoRA factors on it."""
    from loram_cli.modeling.narrow import load_causal_lm
    from loram_cli.modeling.quantize import nf4_config, prepare_for_training
    from loram_cli.training.adapters import attach_lora
    from loram_cli.training.options import weights_dtype

    dtype = weights_dtype(spec.precision, device, full_parameters=False)
    if spec.fsdp:
        from loram_cli.modeling.sharding import SharedModel

        shared = SharedModel(
            spec.source,
            dtype=dtype,
            device=device,
            attention=spec.attention,
            nf4=spec.quantize == "nf4",
        )
        model = attach_lora(shared.model, lora, seed=spec.seed)
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
    return attach_lora(model, lora, seed=spec.seed)


def _split(spec: TrainSpec, tokenizer: Any, reporter: Reporter) -> tuple[list[Any], list[Any]]:
    from loram_cli.training.data import load_instructions, split_eval
    from loram_cli.training.markers import foreign_markers

    examples = load_instructions(spec.data, tokenizer=tokenizer, reporter=reporter)
    texts = (text for example in examples for text in (example.prompt, example.completion))
    markers = foreign_markers(texts, tokenizer)
    if markers:
        reporter.warn(
            f"{spec.data}: {', '.join(markers)} are not tokens of this model: "
            "is the text in another model's chat format?"
        )
    if spec.eval_data is not None:
        held_out = load_instructions(spec.eval_data, tokenizer=tokenizer, reporter=reporter)
        return examples, held_out[: spec.eval_examples]
    return split_eval(examples, min(spec.eval_examples, len(examples) // 10), spec.seed)
