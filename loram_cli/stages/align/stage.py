"""Align: bring the pruned model back towards the full one before it is trained on.

The paper continues pre-training (section 3.3). Fitting each pruned layer to the full model's, and
distilling the full model's logits, see its answers as well as the text; they may come before or
instead.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.processes import process_count
from loram_cli.runs.staging import SCRATCH_NAMES
from loram_cli.stages.align.needs import align_needs, frozen_params
from loram_cli.stages.core.lifecycle import (
    StageResult,
    check_out_of_tree,
    check_positive,
    stage_run,
)
from loram_cli.stages.core.plan import StagePlan, check_model, count_documents, make_plan
from loram_cli.stages.fit.launchers import as_launched
from loram_cli.stages.fit.run import (
    check_fit,
    fit_device,
    plan_together,
    prepare_tracking,
    warn_of_memory,
)
from loram_cli.units import GIB

Method = Literal["reconstruct", "distill", "pretrain"]
_NEED_BASE = {"reconstruct", "distill"}


@dataclass(frozen=True, kw_only=True)
class AlignSpec:
    """How to align.

    Attributes:
        source: The pruned model's directory.
        out: Where the aligned model goes.
        data: Text: a file, a folder, a data set id, or ``demo:corpus``.
        method: What to do, in this order: ``reconstruct`` fits each pruned layer to the full one
            (one layer in memory), ``distill`` learns the full model's logits (both in memory),
            ``pretrain`` is the paper's continued pre-training.
        model: The full model, for the first two; None is where it lay when it was pruned.
        block_length: Tokens per packed row.
        learning_rate: The reference code's 5e-5.
        steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up.
        batch: Rows per step.
        micro_batch: Rows per forward pass.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between evaluations.
        eval_rows: Packed rows held out.
        calibration_samples: Windows of text to reconstruct on.
        calibration_memory_bytes: Memory for hidden states; what exceeds it lies on disk.
        ridge: Pull of the pruned weights in ``reconstruct``, as a share of the inputs' power.
        targets: Whether the full layers that are fitted to run on the ``full`` model's own hidden
            states or (``local``) on the pruned one's.
        block_steps: Gradient steps on each layer after its closed form.
        block_learning_rate: Of these, falling linearly.
        distill_temperature: Softens both distributions.
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
        fsdp: Share the model out among the launcher's processes.
        force: Replace an existing output.
    """

    source: Path
    out: Path
    data: str
    method: tuple[Method, ...] = ("pretrain",)
    model: Path | None = None
    block_length: int = 512
    learning_rate: float = 5e-5
    steps: int = 400
    warmup_steps: int = 20
    batch: int = 32
    micro_batch: int = 4
    save_steps: int = 50
    eval_steps: int = 50
    eval_rows: int = 32
    calibration_samples: int = 128
    calibration_memory_bytes: int = 4 * GIB
    ridge: float = 0.01
    targets: Literal["full", "local"] = "full"
    block_steps: int = 0
    block_learning_rate: float = 1e-3
    distill_temperature: float = 1.0
    train_lm_head: bool = False
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
        check_positive(self, "block_length", "calibration_samples", "block_learning_rate")
        check_positive(self, "distill_temperature")
        check_fit(self)
        if not self.method or len(set(self.method)) != len(self.method):
            raise UsageError("--method wants one or more methods, each once")
        for name in ("ridge", "block_steps", "calibration_memory_bytes"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} cannot be negative")


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
    from loram_cli.checkpoint.model import Model

    spec = as_launched(spec)
    check_out_of_tree(spec.out, spec.source)
    prepare_tracking(spec)
    manifest = Manifest.read(spec.source)
    if manifest.stage != "prune":
        raise LoramError(f"{spec.source}: was made by '{manifest.stage}', 'prune' output is wanted")
    if "reconstruct" in spec.method and manifest.sparsity:
        raise UsageError(
            f"--method reconstruct: {spec.source} was pruned by {manifest.spec['strategy']}, "
            "whose zeros the closed form would fill",
            "use distill or pretrain, which keep them",
        )
    if process_count() > 1 and spec.method != ("pretrain",):
        raise UsageError(
            "--method reconstruct and distill work in one process",
            "pass --method pretrain, or align without a launcher and train with it",
        )
    model = Model.open(spec.source)
    _, family, index = check_model(model)
    source = {"path": str(spec.source), "key": manifest.key, **model.identity.to_mapping()}
    inputs: dict[str, Any] = {"source": source}
    if _NEED_BASE & set(spec.method):
        inputs["base"] = _base(spec, manifest)
    figures: dict[str, Any] = {"params": index.num_params}
    fits = [method for method in spec.method if method != "reconstruct"]
    if fits:
        steps = len(fits) * spec.steps
        frozen = frozen_params(spec, family, index)
        figures |= {"trained_params": index.num_params - frozen, "steps": steps}
        figures["tokens"] = steps * spec.batch * spec.block_length
    if count:
        figures["documents"] = count_documents(spec.data, reporter)
    disk_bytes, memory_bytes = align_needs(spec, family, index, inputs.get("base"))
    return make_plan(
        "align",
        spec,
        inputs,
        disk_bytes=disk_bytes,
        reads=(*(record["path"] for record in inputs.values()), spec.data),
        base=manifest.base,
        keep=manifest.keep,
        sparsity=manifest.sparsity,
        memory_bytes=memory_bytes,
        processes=process_count(),
        figures=figures,
    )


def run(spec: AlignSpec, reporter: Reporter) -> StageResult:
    """Align the pruned model, and write it as a checkpoint of the same shape.

    Raises:
        LoramError: See :func:`plan`.
    """
    spec = as_launched(spec)
    device = fit_device(spec, reporter)
    planned = plan_together(plan, spec, reporter)
    with stage_run("align", spec, planned.inputs, spec.source, resumable=True) as stage:
        if stage.finished is not None:
            return stage.finished
        # Activations are not in the count, and what makes them less would not help.
        smaller = [] if spec.method == ("reconstruct",) else ["--method reconstruct"]
        warn_of_memory(planned, smaller, device, reporter)
        results = _align(spec, planned, device, stage.path, stage.restart_meter, reporter)
        return stage.commit(results, **planned.carried)


def _base(spec: AlignSpec, manifest: Manifest) -> dict[str, Any]:
    """Identity of the full model, once it is known to be the one that was pruned."""
    from loram_cli.stages.recover.stage import check_base

    base = spec.model or Path(manifest.base["path"])
    if not base.is_dir():
        raise LoramError(
            f"{base}: the base that {spec.source} was pruned from is not there",
            "pass --model DIR; --method pretrain does without",
        )
    check_out_of_tree(spec.out, base)
    return check_base(manifest, base, spec.source)


def _align(
    spec: AlignSpec,
    planned: StagePlan,
    device: str,
    path: Path,
    start_meter: Callable[[], None],
    reporter: Reporter,
) -> dict[str, Any]:
    import peft  # noqa: F401 - imported here so that its memory is not charged to training
    import transformers

    from loram_cli.modeling.load import load_tokenizer
    from loram_cli.stages.align.methods import METHODS, Alignment
    from loram_cli.training.data.documents import load_text
    from loram_cli.training.data.tokens import pack_tokens

    base = Path(planned.inputs["base"]["path"]) if "base" in planned.inputs else None
    tokenizer = load_tokenizer(spec.source)
    rows = pack_tokens(load_text(spec.data), tokenizer, spec.block_length)
    held_out = min(spec.eval_rows, len(rows) // 10)
    transformers.set_seed(spec.seed)
    start_meter()
    done: list[dict[str, Any]] = []
    source = spec.source
    for number, method in enumerate(spec.method):
        last = number == len(spec.method) - 1
        work = Alignment(
            spec=spec,
            source=source,
            out=path if last else path / "methods" / f"{number}-{method}",
            base=base,
            device=device,
            pruned_layers=tuple(sorted(int(i) for i in planned.keep)),
            sparse=bool(planned.sparsity),
            train_rows=rows[held_out:],
            eval_rows=rows[:held_out],
        )
        if last:
            done.append({"method": method, **METHODS[method](work, reporter)})
        else:
            done.append(_remembered(method, METHODS[method], work, reporter))
        source = work.out
    return _summary(done)


def _remembered(
    method: str, act: Callable[..., dict[str, Any]], work: Any, reporter: Reporter
) -> dict[str, Any]:
    """Do a method that is not the last one, unless it was done before an interruption."""
    record = work.out / "results.json"
    if record.is_file():
        return dict(json.loads(record.read_text("utf-8")))
    work.out.mkdir(parents=True, exist_ok=True)
    results = {"method": method, **act(work, reporter)}
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(results), "utf-8")
    partial.rename(record)
    # Nothing of it has to be done again.
    for name in SCRATCH_NAMES:
        shutil.rmtree(work.out / name, ignore_errors=True)
    return results


def _summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """The last method's results, with the whole chain's cost and first loss."""
    return {
        **done[-1],
        "method": [results["method"] for results in done],
        "steps": sum(results.get("steps", 0) for results in done),
        "tokens": sum(results["tokens"] for results in done),
        "eval_loss_before": done[0]["eval_loss_before"],
        "chain": done if len(done) > 1 else [],
    }
