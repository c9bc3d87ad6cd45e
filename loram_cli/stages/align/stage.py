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
from typing import Any

import peft  # noqa: F401 - imported here so that its memory is not charged to training
import transformers

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.sources import is_hub_id, resolve_model
from loram_cli.errors import LoramError, UsageError
from loram_cli.modeling.load import load_tokenizer
from loram_cli.pruning.groups import kept_layers, layer_keeps
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.processes import process_count
from loram_cli.runs.staging import SCRATCH_NAMES
from loram_cli.runs.whole import damage, is_marked, mark_whole
from loram_cli.schema import plain, revived
from loram_cli.stages.align.methods.method import Alignment
from loram_cli.stages.align.methods.table import METHODS
from loram_cli.stages.align.methods.trained import check_trained, trained_params
from loram_cli.stages.align.spec import AlignSpec
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.core.lineage import check_base, describe_source
from loram_cli.stages.core.plan import (
    TRIED_RECORDS,
    StagePlan,
    check_out_of_tree,
    make_plan,
    reads_quickly,
)
from loram_cli.stages.core.results import AlignResult, MethodResult
from loram_cli.stages.fit.launchers import as_launched
from loram_cli.stages.fit.run import (
    check_device,
    fit_device,
    held_out,
    plan_together,
    warn_of_memory,
)
from loram_cli.training.data.documents import load_text
from loram_cli.training.data.sources import load_sources
from loram_cli.training.data.tokens import TokenRow, pack_tokens

__all__ = ["AlignSpec", "plan", "run"]


@dataclass(frozen=True)
class AlignWork:
    """The models of an alignment, opened: the pruned one, and the full one where it is read."""

    source: Model
    base: Model | None


def plan(spec: AlignSpec, reporter: Reporter, *, count: bool = False) -> StagePlan[AlignWork]:
    """Check everything that can be known before a tensor is read.

    Raises:
        LoramError: The source is no whole output of ``prune``, the disk is too full, or the text
            is unusable.
    """
    spec = as_launched(spec)
    check_out_of_tree(spec.out, spec.source)
    check_device(spec)
    manifest = Manifest.read(spec.source)
    if manifest.stage != "prune":
        raise LoramError(
            f"{spec.source}: was made by '{manifest.stage}', expected an output of 'prune'"
        )
    model = Model.open(spec.source)
    _check_methods(spec, manifest, model)
    model.check_whole()
    source = describe_source(model)
    inputs: dict[str, Any] = {"source": source.record}
    base = None
    if any(METHODS[method].uses_base for method in spec.method):
        base = _open_base(spec, manifest)
        inputs["base"] = check_base(manifest, base, spec.source)
    figures: dict[str, Any] = {"params": model.num_params}
    fits = [method for method in spec.method if METHODS[method].takes_steps]
    if fits:
        steps = len(fits) * spec.steps
        figures |= {"trained_params": trained_params(spec, model)}
        figures |= {"steps": steps, "tokens": steps * spec.batch * spec.block_length}
    if count:
        figures |= _counted(spec, reporter)
    needs = [METHODS[method].needs(spec, model, base) for method in spec.method]
    return make_plan(
        "align",
        spec,
        inputs,
        AlignWork(model, base),
        # The output, what each method before the last one leaves until the end, and their own.
        disk_bytes=model.num_bytes * len(spec.method) + sum(need.disk_bytes for need in needs),
        reads=(*(record["path"] for record in inputs.values()), spec.data),
        base=source.base,
        keep=source.keep,
        sparsity=source.sparsity,
        memory_bytes=max(need.memory_bytes for need in needs),
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
    with stage_run(planned, spec, spec.source, resumable=True) as stage:
        if stage.finished is not None:
            return stage.finished
        # Activations are not in the count, and what makes them less would not help.
        smaller = [] if spec.method == ("reconstruct",) else ["--method reconstruct"]
        if smaller and spec.trained == "all":
            smaller.append("--trained norms")
        warn_of_memory(planned, smaller, device, reporter)
        return stage.commit(
            _align(spec, planned, device, stage.path, stage.restart_meter, reporter)
        )


def _check_methods(spec: AlignSpec, manifest: Manifest, model: Model) -> None:
    for name in spec.method:
        method = METHODS[name]
        if method.fills_zeros and manifest.sparsity:
            raise UsageError(
                f"--method {name}: {spec.source} was pruned by {manifest.spec['strategy']}, "
                "whose zeros the closed form would fill",
                "use distill or pretrain, which keep them",
            )
        changed = layer_keeps(manifest.keep) or manifest.sparsity or model.low_bit
        if method.fits_layers and not changed:
            whole_layers = kept_layers(manifest.keep) is None
            raise UsageError(
                f"--method {name} fits layers that lost heads or channels, and {spec.source} "
                f"{'holds its linears as factors' if whole_layers else 'lacks whole layers'}",
                "pass --method distill or pretrain",
            )
    if any(METHODS[name].takes_steps for name in spec.method):
        check_trained(spec, model, bool(manifest.sparsity))
    if process_count() > 1 and not (
        len(spec.method) == 1 and METHODS[spec.method[0]].several_processes
    ):
        raise UsageError(
            "--method reconstruct and distill work in one process",
            "pass --method pretrain, or align without a launcher and train with it",
        )


def _rows(spec: AlignSpec, reporter: Reporter) -> list[TokenRow]:
    """Packed text. Weights of several sources are shares of the tokens, not of the documents."""
    tokenizer = load_tokenizer(spec.source)

    def load(name: str) -> list[TokenRow]:
        return pack_tokens(load_text(name, reporter=reporter), tokenizer, spec.block_length)

    return list(load_sources(spec.data, load, seed=spec.seed, exhausted=spec.exhausted))


def _counted(spec: AlignSpec, reporter: Reporter) -> dict[str, int | None]:
    """Rows to learn and to hold out; text that takes long to read is only tried."""
    if not reads_quickly(spec.data):
        load_text(spec.data, limit=TRIED_RECORDS, reporter=reporter)
        return {"rows": None}
    rows = len(_rows(spec, reporter))
    evaluated = held_out(spec.eval_rows, rows, "--eval-rows", reporter)
    return {"rows": rows - evaluated, "eval_rows": evaluated}


def _open_base(spec: AlignSpec, manifest: Manifest) -> Model:
    base = spec.model or Path(manifest.base["path"])
    if is_hub_id(str(base)):
        base = resolve_model(str(base))
    if not base.is_dir():
        raise LoramError(
            f"{base}: the base that {spec.source} was pruned from is not there",
            "pass --model DIR; --method pretrain does without",
        )
    check_out_of_tree(spec.out, base)
    return Model.open(base)


def _align(
    spec: AlignSpec,
    planned: StagePlan[AlignWork],
    device: str,
    path: Path,
    start_meter: Callable[[], None],
    reporter: Reporter,
) -> AlignResult:
    source = planned.work.source
    rows = _rows(spec, reporter)
    evaluated = held_out(spec.eval_rows, len(rows), "--eval-rows", reporter)
    transformers.set_seed(spec.seed)
    start_meter()
    done: list[MethodResult] = []
    for number, method in enumerate(spec.method):
        last = number == len(spec.method) - 1
        work = Alignment(
            spec=spec,
            method=method,
            source=source,
            out=path if last else path / "methods" / f"{number}-{method}",
            base=planned.work.base,
            device=device,
            pruned_layers=tuple(sorted(layer_keeps(planned.keep))),
            sparse=bool(planned.sparsity),
            train_rows=rows[evaluated:],
            eval_rows=rows[:evaluated],
        )
        if last:
            done.append(METHODS[method].act(work, reporter))
        else:
            done.append(_remembered(work, reporter))
            source = Model.open(work.out)
    return _summary(done)


def _remembered(work: Alignment, reporter: Reporter) -> MethodResult:
    """Do a method that is not the last one, unless it was done before an interruption."""
    record = work.out / "results.json"
    if is_marked(work.out):
        wrong = damage(work.out)
        if wrong is None:
            known: MethodResult = revived(MethodResult, json.loads(record.read_text("utf-8")))
            return known
        reporter.warn(f"{work.out}: damaged, {wrong}: doing '{work.method}' again")
        shutil.rmtree(work.out)
    work.out.mkdir(parents=True, exist_ok=True)
    result = METHODS[work.method].act(work, reporter)
    record.write_text(json.dumps(plain(result)), "utf-8")
    # Nothing of it has to be done again.
    for name in SCRATCH_NAMES:
        shutil.rmtree(work.out / name, ignore_errors=True)
    mark_whole(work.out)
    return result


def _summary(done: list[MethodResult]) -> AlignResult:
    """The last method's figures, with the whole chain's cost and first loss."""
    last = done[-1]
    return AlignResult(
        method=tuple(result.method for result in done),
        steps=sum(result.steps for result in done),
        tokens=sum(result.tokens for result in done),
        final_train_loss=last.final_train_loss,
        eval_loss_before=done[0].eval_loss_before,
        eval_loss_after=last.eval_loss_after,
        trained_params=last.trained_params,
        zeros=last.zeros,
        layer_errors=last.layer_errors,
        chain=tuple(done) if len(done) > 1 else (),
    )
