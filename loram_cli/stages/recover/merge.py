"""Merge: a recovered adapter added to the base's weights, some rows at a time."""

import json
from pathlib import Path
from typing import Any

from loram_cli.arch.experts import AdaptedWeight
from loram_cli.checkpoint.background import read_ahead
from loram_cli.checkpoint.json_files import read_json
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.sources import copy_companions, copy_template
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.lora.adapter import WEIGHTS_NAME, LoraAdapter, read_shapes
from loram_cli.lora.scatter import add_expert_updates, add_update
from loram_cli.lora.wrapped import read_adapter
from loram_cli.reporting import Reporter
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.core.lineage import trained_layout
from loram_cli.stages.core.plan import (
    StagePlan,
    check_free_disk,
    check_out_of_tree,
    free_disk,
    make_plan,
)
from loram_cli.stages.core.results import MergeResult
from loram_cli.stages.recover.spec import MergeSpec
from loram_cli.stages.recover.stage import open_inputs
from loram_cli.stages.recover.work import RecoverWork

__all__ = ["MergeSpec", "plan", "plan_ahead", "run"]


def plan(spec: MergeSpec, reporter: Reporter, *, count: bool = False) -> StagePlan[RecoverWork]:
    """Check everything that can be known before a tensor is read.

    Raises:
        LoramError: Another base, or no disk.
    """
    work = open_inputs(spec, "recover", "run 'loram recover' first")
    work.model.check_whole()
    return make_plan(
        "merge",
        spec,
        work.inputs,
        work,
        disk_bytes=_merged_bytes(spec.adapter, work.model),
        reads=(spec.adapter, spec.model),
        base=work.inputs["base"],
        memory_bytes=(spec.adapter / WEIGHTS_NAME).stat().st_size,
        figures={"params": work.model.num_params},
    )


def plan_ahead(spec: MergeSpec, adapter_bytes: int) -> StagePlan[None]:
    """The plan of a merge whose adapter is not recovered yet: from the base only.

    Raises:
        LoramError: No disk, or no whole base.
    """
    check_out_of_tree(spec.out, spec.model, spec.adapter)
    model = Model.open(spec.model)
    model.check_whole()
    needed_bytes = model.index.whole.num_bytes + adapter_bytes
    check_free_disk(spec.out, needed_bytes)
    return StagePlan(
        stage="merge",
        reads=(str(spec.adapter), str(spec.model)),
        writes=spec.out,
        work=None,
        checked=False,
        disk_bytes=needed_bytes,
        free_bytes=free_disk(spec.out),
        memory_bytes=adapter_bytes,
        figures={"params": model.num_params},
    )


def run(spec: MergeSpec, reporter: Reporter) -> StageResult:
    """Write the base with the adapter added, some rows at a time.

    Raises:
        LoramError: See :func:`plan`; also NaN weights.
    """
    planned = plan(spec, reporter)
    model = planned.work.model
    with stage_run(planned, spec, spec.adapter) as stage:
        if stage.finished is not None:
            return stage.finished
        stage.restart_meter()
        adapter = read_adapter(spec.adapter, model.wrapper)
        config, digests = merge_weights(spec, adapter, model, stage.path, reporter)
        (stage.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(spec.model, stage.path, processors=model.wrapper is not None)
        copy_template(spec.adapter, stage.path)
        result = MergeResult(
            modules=len(adapter.pairs),
            weight_bytes=model.index.whole.num_bytes,
            layout=trained_layout(spec.adapter),
        )
        return stage.commit(result, digests=digests)


def merge_weights(
    spec: MergeSpec, adapter: LoraAdapter, model: Model, directory: Path, reporter: Reporter
) -> tuple[dict[str, Any], dict[str, str]]:
    """Stream ``W + scaling * B @ A`` for every tensor of the base.

    The other parts of a multimodal model, such as its vision tower, are copied.

    Returns:
        The merged checkpoint's config (a tied head that the adapter changes is untied in it), and
        the SHA-256 of every file of weights.
    """
    family, index = model.family, model.index
    config = dict(model.config)
    modules = _adapted_weights(adapter, model)
    sources = {name: name for name in index.tensors if not family.is_ignored(name)}
    head = f"{family.lm_head}.weight"
    untied = {}
    if family.lm_head in adapter.pairs and model.tied_embeddings:
        sources[head] = head if head in sources else f"{family.embedding}.weight"
        untied = {"tie_word_embeddings": False}
    if model.wrapper is None:
        config |= untied
    else:
        config = read_json(model.directory / "config.json")
        config = {**config, **untied, "text_config": {**config["text_config"], **untied}}
        index = index.whole
        sources |= {name: name for name in model.index.others}
    stored = {name: _stored_name(model, name) for name in sources}
    planned = {
        stored[name]: TensorPlan.like(index.tensors[source]) for name, source in sources.items()
    }
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
            if name in modules:
                module, adapted = modules[name]
                pair, scaling = adapter.pairs[module], adapter.scaling(module)
                if adapted.experts:
                    add_expert_updates(
                        rows, start, pair, scaling, adapted.experts, transposed=adapted.transposed
                    )
                else:
                    add_update(rows, start, pair, scaling)
            writer.write(stored[name], rows)
            progress.advance(rows.nbytes / 2**20)
    return config, writer.digests


def _adapted_weights(adapter: LoraAdapter, model: Model) -> dict[str, tuple[str, AdaptedWeight]]:
    """By the name of each tensor that the adapter changes: its module, and how it is changed."""
    head = f"{model.family.lm_head}.weight"
    shapes = {head: model.shapes[f"{model.family.embedding}.weight"], **model.shapes}
    found = {m: model.family.adapted_weight(m, shapes) for m in adapter.pairs}
    return {adapted.tensor: (m, adapted) for m, adapted in found.items() if adapted is not None}


def _stored_name(model: Model, name: str) -> str:
    """A tensor's name in the merged file: a multimodal model's keep those that they had."""
    if model.wrapper is None:
        return name
    entry = model.index.whole.tensors.get(name)
    return name if entry is None else entry.name


def _merged_bytes(adapter: Path, model: Model) -> int:
    """Bytes of the merged weights; a tied head that the adapter changes becomes a tensor."""
    head, embedding = (f"{name}.weight" for name in (model.family.lm_head, model.family.embedding))
    untied = model.family.lm_head in read_shapes(adapter) and head not in model.index.tensors
    return model.index.whole.num_bytes + (model.index.tensors[embedding].num_bytes if untied else 0)
