"""Align: a little full-parameter training of the pruned model on text (paper, section 3.3)."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.processes import is_main_process
from loram_cli.stages.common import StageResult, check_out_of_tree, check_positive, stage_run
from loram_cli.stages.fitting import (
    check_fit,
    finish_fit,
    fit_device,
    fit_options,
    plan_together,
    prepare_tracking,
)
from loram_cli.stages.planning import StagePlan, check_model, count_documents, make_plan

if TYPE_CHECKING:
    from loram_cli.checkpoint.index import CheckpointIndex


@dataclass(frozen=True, kw_only=True)
class AlignSpec:
    """How to align.

    Attributes:
        source: The pruned model's directory.
        out: Where the aligned model goes.
        data: Text: a file, a folder, a data set id, or ``demo:corpus``.
        block_length: Tokens per packed row.
        learning_rate: The reference code's 5e-5.
        steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up.
        batch: Rows per step.
        micro_batch: Rows per forward pass.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between evaluations.
        eval_rows: Packed rows held out.
        train_lm_head: Train the head too; the reference code freezes it.
        gradient_checkpointing: Trade time for activation memory.
        cross_entropy: ``chunked`` never holds all logits, ``full`` is transformers' own loss.
        attention: ``sdpa`` of torch, ``flash`` of the flash-attn package, or ``eager``; ``auto``
            leaves the choice to transformers.
        optimizer: ``adamw``, or ``paged_adamw_8bit`` with a quarter of its state (GPU alone).
        precision: ``bf16`` or ``fp32``; ``auto`` is bf16 on a GPU that has it.
        report_to: Trackers that get the losses as well: ``tensorboard``, ``wandb``.
        seed: Decides the order.
        device: Where to run; a GPU when there is one.
        force: Replace an existing output.
    """

    source: Path
    out: Path
    data: str
    block_length: int = 512
    learning_rate: float = 5e-5
    steps: int = 400
    warmup_steps: int = 20
    batch: int = 32
    micro_batch: int = 4
    save_steps: int = 50
    eval_steps: int = 50
    eval_rows: int = 32
    train_lm_head: bool = False
    gradient_checkpointing: bool = False
    cross_entropy: Literal["full", "chunked"] = "chunked"
    attention: Literal["auto", "sdpa", "flash", "eager"] = "auto"
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = 42
    device: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "block_length")
        check_fit(self)


def plan(spec: AlignSpec, reporter: Reporter, *, count: bool = False) -> StagePlan:
    """Check everything that can be known before a tensor is read.

    Args:
        spec: How to align.
        reporter: Told of oddities in the text.
        count: Read the text too, and count what is in it.

    Raises:
        LoramError: The source is no whole output of ``prune``, the disk is too full, or the text
            is unusable.
    """
    from loram_cli.checkpoint.identity import identify

    check_out_of_tree(spec.out, spec.source)
    prepare_tracking(spec)
    manifest = Manifest.read(spec.source)
    if manifest.stage != "prune":
        raise LoramError(f"{spec.source}: was made by '{manifest.stage}', 'prune' output is wanted")
    _, family, index = check_model(spec.source)
    source = {"path": str(spec.source), "key": manifest.key, **identify(spec.source).to_mapping()}
    params = index.num_params
    head = index.tensors.get(f"{family.lm_head}.weight")
    frozen = 0 if head is None or spec.train_lm_head else math.prod(head.shape)
    # fp32 weights, gradients and AdamW's two moments; a checkpoint holds all but the gradients,
    # and the next one is written before the one before last is removed.
    memory_bytes = 4 * (4 * params - 3 * frozen)
    figures = {"params": params, "trained_params": params - frozen, "steps": spec.steps}
    figures |= {"tokens": spec.steps * spec.batch * spec.block_length}
    if count:
        figures["documents"] = count_documents(spec.data, reporter)
    return make_plan(
        "align",
        spec,
        {"source": source},
        disk_bytes=index.num_bytes + 3 * 4 * (3 * params - 2 * frozen),
        reads=(str(spec.source), spec.data),
        base=manifest.base,
        keep=manifest.keep,
        sparsity=manifest.sparsity,
        memory_bytes=memory_bytes,
        figures=figures,
    )


def run(spec: AlignSpec, reporter: Reporter) -> StageResult:
    """Continue pre-training of the pruned model, and write it as a checkpoint of the same shape.

    Raises:
        LoramError: See :func:`plan`.
    """
    device = fit_device(spec)
    planned = plan_together(plan, spec, reporter)
    with stage_run("align", spec, planned.inputs, spec.source, resumable=True) as stage:
        if stage.finished is not None:
            return stage.finished
        sparse = bool(planned.sparsity)
        results = _align(spec, device, sparse, stage.path, stage.restart_meter, reporter)
        return stage.commit(results, **planned.carried)


def _align(
    spec: AlignSpec,
    device: str,
    sparse: bool,
    path: Path,
    start_meter: Callable[[], None],
    reporter: Reporter,
) -> dict[str, object]:
    import peft  # noqa: F401 - imported here so that its memory is not charged to training
    import torch
    import transformers

    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import CheckpointIndex, read_config
    from loram_cli.checkpoint.sources import copy_companions
    from loram_cli.modeling.narrow import load_causal_lm, load_tokenizer
    from loram_cli.training.data import load_text
    from loram_cli.training.loop import fit_causal_text, save_causal_lm
    from loram_cli.training.tokens import pack_tokens

    tokenizer = load_tokenizer(spec.source)
    rows = pack_tokens(load_text(spec.data), tokenizer, spec.block_length)
    held_out = min(spec.eval_rows, len(rows) // 10)
    eval_rows, train_rows = rows[:held_out], rows[held_out:]
    transformers.set_seed(spec.seed)
    start_meter()
    # Master weights in fp32: steps of 5e-5 vanish in bfloat16's eight bits.
    model = load_causal_lm(
        spec.source, dtype=torch.float32, device=device, attention=spec.attention
    ).train()
    config = read_config(spec.source)
    family = family_for(config, str(spec.source))
    masked = list(family.linear_names(config["num_hidden_layers"])) if sparse else []
    fitted = fit_causal_text(
        model,
        train_rows,
        eval_rows,
        fit_options(spec),
        path,
        reporter,
        train_lm_head=spec.train_lm_head,
        masked=masked,
    )
    losses = finish_fit(fitted, path, "Alignment of the pruned model")
    index = CheckpointIndex.open(spec.source)
    zeros = _count_zeros(model, masked, index) if sparse else None
    stored = next(iter(index.tensors.values())).dtype
    if is_main_process():
        save_causal_lm(model, path, dtype=stored)
        shutil.copyfile(spec.source / "config.json", path / "config.json")
        copy_companions(spec.source, path)
    return {
        "steps": spec.steps,
        "tokens": spec.steps * spec.batch * spec.block_length,
        "trained_params": fitted.trainable_params,
        "zeros": zeros,
        **losses,
    }


def _count_zeros(model: Any, masked: list[str], index: "CheckpointIndex") -> int:
    """Zeros in the masked weights, after a check that each of the pruned model's is still one."""
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.training.masks import check_zeros

    parameters = dict(model.named_parameters())
    with TensorReader(index) as reader:
        return sum(check_zeros(n, reader.read(n), parameters[n].detach()) for n in masked)
