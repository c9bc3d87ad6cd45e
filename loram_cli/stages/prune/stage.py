"""Prune a base checkpoint: whole groups or single weights, written shard by shard."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.core.lifecycle import (
    StageResult,
    check_free_disk,
    check_out_of_tree,
    stage_run,
)
from loram_cli.stages.core.plan import find_finished
from loram_cli.stages.prune.methods import check_method
from loram_cli.stages.prune.plan import PrunePlan
from loram_cli.stages.prune.widths import (
    check_amount,
    choose_widths,
    layers_to_prune,
    plan_input,
    rank_globally,
    settle_amounts,
)
from loram_cli.units import GIB

if TYPE_CHECKING:
    from loram_cli.pruning.groups import LayerKeep


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """How to prune.

    Attributes:
        model: The base's directory.
        out: Where the pruned checkpoint goes.
        strategy: ``rand`` draws whole groups, ``stru`` ranks them; ``unst`` zeroes single weights
            and ``semi`` two in every four, in all decoder linears.
        ratio: Share of groups to drop in every pruned layer, or of weights to zero, in (0, 1);
            ``semi`` has 0.5 and no other. 0.65 where nothing else says how much goes.
        plan: In place of ``ratio``: a file with ratios of its own for layers.
        target_params: In place of ``ratio``: parameters that the pruned model may have; a number,
            or text such as ``6B``.
        fit_memory: In place of ``ratio``: memory of the card that LoRA training is to fit on, as
            ``memory-report`` counts it; bytes, or text such as ``24GiB``.
        quantize: With ``fit_memory``: training holds the weights in ``nf4``, else in bf16.
        rank: With ``fit_memory``: LoRA rank.
        micro_batch: With ``fit_memory``: examples per forward pass of training.
        max_length: With ``fit_memory``: tokens per example.
        gradient_checkpointing: With ``fit_memory``: training trades time for memory.
        scope: ``layer``: every layer loses its own share; ``global``: the groups of all layers
            are ranked together.
        multiple_of: The MLP channels that stay are a multiple of so many, rounded up; 64 lets a GPU
            multiply them at full speed, 1 is the paper.
        keep_first: Layers at the input side that stay whole (``rand`` and ``stru`` alone).
        keep_last: Layers at the output side that stay whole (``rand`` and ``stru`` alone).
        importance: ``stru`` ranks by first-order ``taylor``, ``unst`` and ``semi`` choose by
            ``sparsegpt``, unless it is ``l2``: magnitude, without data.
        calibration: Text for either: a path, a data set id, or ``demo:calibration``.
        calibration_samples: Windows of text; None for the method's own number.
        calibration_length: Tokens per window; None for the method's own number.
        calibration_memory_bytes: Memory for hidden states at layer boundaries; what exceeds it
            lies on the output's disk meanwhile.
        dampening: SparseGPT's addition to the Hessian's diagonal, as a share of its mean.
        block_columns: SparseGPT's columns per update.
        seed: Decides the draw and the windows.
        device: Where calibration runs; a GPU when there is one.
        max_shard_bytes: Upper bound on one shard of the output.
        force: Replace an existing output.
    """

    model: Path
    out: Path
    strategy: Literal["rand", "stru", "semi", "unst"] = "stru"
    ratio: float | None = None
    plan: Path | None = None
    target_params: int | str | None = None
    fit_memory: int | str | None = None
    quantize: Literal["nf4"] | None = None
    rank: int = 8
    micro_batch: int = 4
    max_length: int = 512
    gradient_checkpointing: bool = False
    scope: Literal["layer", "global"] = "layer"
    multiple_of: int = 1
    keep_first: int = 4
    keep_last: int = 2
    importance: Literal["taylor", "l2", "sparsegpt"] | None = None
    calibration: str | None = None
    calibration_samples: int | None = None
    calibration_length: int | None = None
    calibration_memory_bytes: int = 4 * GIB
    dampening: float = 0.01
    block_columns: int = 128
    seed: int = 42
    device: str | None = None
    max_shard_bytes: int = 5 * 10**9
    force: bool = False

    def __post_init__(self) -> None:
        settle_amounts(self)
        check_amount(self)
        if self.multiple_of < 1:
            raise UsageError("--multiple-of must be above 0")
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} cannot be negative")
        for name in ("calibration_samples", "calibration_length", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "calibration_length" else 1):
                raise UsageError(f"--{name.replace('_', '-')} is too low")
        check_method(self)

    @property
    def zeroes_weights(self) -> bool:
        """Whether single weights become zero, and shapes stay."""
        return self.strategy in ("semi", "unst")

    @property
    def method(self) -> str | None:
        """How what goes is chosen; None where it is drawn."""
        default = {"stru": "taylor", "semi": "sparsegpt", "unst": "sparsegpt"}
        return self.importance or default.get(self.strategy)

    @property
    def needs_calibration(self) -> bool:
        """Whether text is needed."""
        return self.method in ("taylor", "sparsegpt")


def plan(spec: PruneSpec) -> PrunePlan:
    """Work out shapes and check everything that can be known before a tensor is read.

    Raises:
        LoramError: The base is not sound, or has no tokenizer, or the disk is too full.
        UsageError: The ratio or the keep flags do not fit the model.
    """
    import math

    from loram_cli.checkpoint.model import Model
    from loram_cli.checkpoint.sources import require_tokenizer
    from loram_cli.checkpoint.writer import TensorPlan
    from loram_cli.stages.prune.calibration import calibration_needs
    from loram_cli.stages.prune.sparse import sparse_plan

    check_out_of_tree(spec.out, spec.model)
    model = Model.open(spec.model)
    config, family = model.config, model.family
    require_tokenizer(spec.model)
    if config.get("per_layer_config") or _is_pruned(spec.model):
        raise UsageError(f"{spec.model}: is pruned already", "prune the original base model")
    index, expected = model.index, model.shapes
    if spec.zeroes_weights:
        return sparse_plan(spec, family, config, index, expected)
    before = model.geometry
    chosen = choose_widths(spec, family, config)
    stored = model.dtype.to_torch()
    calibration = (
        calibration_needs(spec, family, config, stored) if spec.needs_calibration else None
    )
    scratch_bytes = calibration.disk_bytes if calibration else 0
    base_params = sum(math.prod(shape) for shape in expected.values())
    tensors = {
        name: TensorPlan.like(entry) for name, entry in index.tensors.items() if name in expected
    }
    whole = PrunePlan(
        family, config, index, before, before.layers, tensors, base_params, base_params,
        calibration, chosen=chosen,
    )  # fmt: skip
    planned = whole.with_widths(chosen.after)
    check_free_disk(spec.out, planned.out_bytes + scratch_bytes)
    return planned


def check_output(spec: PruneSpec) -> dict[str, Any]:
    """Check that the output is free to be written, or is this very pruning.

    Returns:
        What the pruning comes from: path and digests of the base, and of a plan file.

    Raises:
        LoramError: Another process is writing it.
        UsageError: It is something else's.
    """
    from loram_cli.checkpoint.model import Model

    base = {"path": str(spec.model), **Model.open(spec.model).identity.to_mapping()}
    inputs = {"base": base, **plan_input(spec)}
    find_finished("prune", spec, inputs)
    return inputs


def run(spec: PruneSpec, reporter: Reporter) -> StageResult:
    """Prune, streaming: ``rand`` and ``l2`` hold a few tensors, calibrated ways one decoder layer.

    Raises:
        LoramError: See :func:`plan`; also NaN weights, or unusable calibration text.
    """
    from loram_cli.checkpoint.sources import copy_companions
    from loram_cli.pruning.picture import draw_kept
    from loram_cli.stages.prune.sparse import sparsity_record, write_sparse

    planned = plan(spec)
    inputs = check_output(spec)
    base = inputs["base"]
    with stage_run("prune", spec, inputs, spec.model) as stage:
        if stage.finished is not None:
            return stage.finished
        stage.restart_meter()
        sparsity: dict[str, Any] = {}
        if spec.zeroes_weights:
            keep = {}
            counted, digests = write_sparse(spec, planned, stage.path, reporter)
            results = planned.results() | counted
            sparsity = sparsity_record(spec, results)
        else:
            keep = _keep_indices(spec, planned, stage.path, reporter)
            planned = planned.with_keep(keep)
            results = planned.results()
            digests = _write_weights(spec, planned, keep, stage.path, reporter)
            draw_kept(planned.before.layers, planned.after, stage.path / "kept.png")
        (stage.path / "config.json").write_text(json.dumps(planned.config, indent=2) + "\n")
        copy_companions(spec.model, stage.path)
        return stage.commit(
            results,
            base=base,
            keep={str(i): layer.to_mapping() for i, layer in keep.items()},
            sparsity=sparsity,
            digests=digests,
        )


def _is_pruned(model: Path) -> bool:
    """Whether a directory is an output of ``prune`` or ``align``; zeros do not show in a config."""
    if not (model / MANIFEST_NAME).is_file():
        return False
    return Manifest.read(model).stage in ("prune", "align")


def _keep_indices(
    spec: PruneSpec, planned: PrunePlan, work: Path, reporter: Reporter
) -> "dict[int, LayerKeep]":
    from loram_cli.pruning.select import keep_highest, keep_random
    from loram_cli.stages.prune.ranking import group_scores

    layers = layers_to_prune(spec, planned)
    if spec.strategy == "rand":
        return {
            i: keep_random(planned.before.layers[i], planned.after[i], spec.seed, i) for i in layers
        }
    scores = group_scores(spec, planned, layers, work, reporter)
    if spec.scope == "global":
        return rank_globally(planned, scores, spec.multiple_of)
    return {i: keep_highest(scores[i], planned.after[i]) for i in layers}


def _write_weights(
    spec: PruneSpec,
    planned: PrunePlan,
    keep: "dict[int, LayerKeep]",
    directory: Path,
    reporter: Reporter,
) -> dict[str, str]:
    from loram_cli.checkpoint.background import read_ahead
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.checkpoint.writer import ShardedWriter
    from loram_cli.pruning.slicing import read_kept

    with (
        TensorReader(planned.index, once=True) as reader,
        ShardedWriter(directory, planned.tensors, spec.max_shard_bytes) as writer,
        reporter.progress("write", planned.out_bytes / 2**20, "MiB") as progress,
        read_ahead(
            (name, rows)
            for name in planned.tensors
            for rows in read_kept(reader, name, planned.family, planned.before, keep)
        ) as kept,
    ):
        for name, rows in kept:
            writer.write(name, rows)
            progress.advance(rows.nbytes / 2**20)
    return writer.digests
