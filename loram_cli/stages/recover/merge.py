"""Merge: a recovered adapter added to the base's weights, some rows at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.reporting import Reporter
from loram_cli.stages.core.lifecycle import (
    StageResult,
    check_free_disk,
    check_out_of_tree,
    stage_run,
)
from loram_cli.stages.core.lineage import trained_layout
from loram_cli.stages.core.plan import StagePlan, check_model, make_plan
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.recover.stage import RecoverSpec, open_inputs

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.lora.adapter import LoraAdapter


@dataclass(frozen=True, kw_only=True)
class MergeSpec:
    """What to merge.

    Attributes:
        adapter: A recovered adapter.
        model: The original base.
        out: Where the merged checkpoint goes.
        max_shard_bytes: Upper bound on one shard.
        force: Replace an existing output.
    """

    adapter: Path
    model: Path
    out: Path
    max_shard_bytes: int = 5 * 10**9
    force: bool = False


def plan(spec: MergeSpec) -> StagePlan:
    """Check everything that can be known before a tensor is read.

    Raises:
        LoramError: Another base, or no disk.
    """
    _, family, index = check_model(spec.model)
    _, inputs = open_inputs(spec, "recover", "run 'loram recover' first")
    return make_plan(
        "merge",
        spec,
        inputs,
        disk_bytes=_merged_bytes(spec, family, index),
        reads=(str(spec.adapter), str(spec.model)),
        base=inputs["base"],
        memory_bytes=_adapter_bytes(spec.adapter),
        figures={"params": index.num_params},
    )


def plan_both(spec: RecoverSpec, merging: MergeSpec | None) -> list[StagePlan]:
    """Plans of recovery and, if asked for, of the merge after it.

    The merge is planned from the base alone while its adapter is not there yet.

    Raises:
        LoramError: See :func:`plan` and :func:`.recover.plan`.
    """
    first = recover.plan(spec)
    if merging is None:
        return [first]
    if first.done:
        return [first, plan(merging)]
    check_out_of_tree(merging.out, merging.model, merging.adapter)
    _, _, index = check_model(merging.model)
    needed_bytes = index.num_bytes + first.disk_bytes
    check_free_disk(merging.out, needed_bytes)
    later = StagePlan(
        stage="merge",
        reads=(str(merging.adapter), str(merging.model)),
        writes=merging.out,
        inputs={},
        disk_bytes=needed_bytes,
        free_bytes=first.free_bytes,
        memory_bytes=first.disk_bytes,
        figures={"params": index.num_params},
    )
    return [first, later]


def run(spec: MergeSpec, reporter: Reporter) -> StageResult:
    """Write the base with the adapter added, some rows at a time.

    Raises:
        LoramError: See :func:`plan`; also NaN weights.
    """
    planned = plan(spec)
    with stage_run("merge", spec, planned.inputs, spec.adapter) as stage:
        if stage.finished is not None:
            return stage.finished
        import json

        from loram_cli.checkpoint.index import CheckpointIndex
        from loram_cli.checkpoint.sources import copy_companions
        from loram_cli.lora.adapter import LoraAdapter

        stage.restart_meter()
        adapter = LoraAdapter.read(spec.adapter)
        index = CheckpointIndex.open(spec.model)
        config, digests = merge_weights(spec, adapter, index, stage.path, reporter)
        (stage.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(spec.model, stage.path)
        results = {
            "modules": len(adapter.pairs),
            "weight_bytes": index.num_bytes,
            "layout": trained_layout(spec.adapter),
        }
        return stage.commit(results, base=planned.base, keep={}, digests=digests)


def merge_weights(
    spec: MergeSpec, adapter: "LoraAdapter", index: Any, directory: Path, reporter: Reporter
) -> tuple[dict[str, Any], dict[str, str]]:
    """Stream ``W + scaling * B @ A`` for every tensor of the base.

    Returns:
        The merged checkpoint's config (a tied head that the adapter changes is untied in it), and
        the SHA-256 of every file of weights.
    """
    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.background import read_ahead
    from loram_cli.checkpoint.index import read_config
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
    from loram_cli.lora.scatter import add_update

    config = read_config(spec.model)
    family = family_for(config, str(spec.model))
    sources = {name: name for name in index.tensors if not family.is_ignored(name)}
    head = f"{family.lm_head}.weight"
    if family.lm_head in adapter.pairs and family.geometry(config).tied_embeddings:
        sources[head] = head if head in sources else f"{family.embedding}.weight"
        config = {**config, "tie_word_embeddings": False}
    planned = {name: TensorPlan.like(index.tensors[source]) for name, source in sources.items()}
    total_bytes = sum(tensor.num_bytes for tensor in planned.values())
    with (
        TensorReader(index, once=True) as reader,
        ShardedWriter(directory, planned, spec.max_shard_bytes) as writer,
        reporter.progress("merge", total_bytes / 2**20, "MiB") as progress,
        read_ahead(
            (name, start, rows)
            for name, source in sources.items()
            for start, rows in reader.read_chunks(source)
        ) as chunks,
    ):
        for name, start, rows in chunks:
            module = name.removesuffix(".weight")
            if module in adapter.pairs:
                add_update(rows, start, adapter.pairs[module], adapter.scaling(module))
            writer.write(name, rows)
            progress.advance(rows.nbytes / 2**20)
    return config, writer.digests


def _merged_bytes(spec: MergeSpec, family: "Family", index: "CheckpointIndex") -> int:
    """Bytes of the merged weights; a tied head that the adapter changes becomes a tensor."""
    from loram_cli.lora.adapter import read_shapes

    head, embedding = f"{family.lm_head}.weight", f"{family.embedding}.weight"
    untied = family.lm_head in read_shapes(spec.adapter) and head not in index.tensors
    return index.num_bytes + (index.tensors[embedding].num_bytes if untied else 0)


def _adapter_bytes(directory: Path) -> int:
    from loram_cli.lora.adapter import WEIGHTS_NAME

    return (directory / WEIGHTS_NAME).stat().st_size
