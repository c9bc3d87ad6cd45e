"""Prune a base checkpoint: whole groups or single weights, written shard by shard."""

import json
from typing import Any

from loram_cli.checkpoint.sources import copy_companions
from loram_cli.pruning.groups import layers_record
from loram_cli.pruning.picture import draw_kept
from loram_cli.reporting import Reporter
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.prune.factored import write_factored
from loram_cli.stages.prune.layers import choose_layers, write_layers
from loram_cli.stages.prune.plan import plan
from loram_cli.stages.prune.rounded import write_rounded
from loram_cli.stages.prune.sparse import sparsity_record, write_sparse
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.stages.prune.structured import choose_groups, write_kept

__all__ = ["PruneSpec", "plan", "run"]


def run(spec: PruneSpec, reporter: Reporter) -> StageResult:
    """Prune, streaming: ``rand`` and ``l2`` hold a few tensors, calibrated ways one decoder layer.

    Raises:
        LoramError: See :func:`plan`; also NaN weights, or unusable calibration text.
    """
    spec = spec.settled()
    planned = plan(spec, reporter)
    work = planned.work
    if work.way is not None:
        spec = work.way.spec
        for line in work.way.said:
            reporter.note(line)
    with stage_run(planned, spec, spec.read) as stage:
        if stage.finished is not None:
            return stage.finished
        stage.restart_meter()
        kept: dict[str, Any] = {}
        sparsity: dict[str, Any] = {}
        if spec.rounds_weights:
            result, digests = write_rounded(spec, work, stage.path, reporter)
            kept = dict(planned.keep)
        elif spec.zeroes_weights:
            result, digests = write_sparse(spec, work, stage.path, reporter)
            sparsity = sparsity_record(spec, result)
        elif spec.chosen_strategy.factors_linears:
            digests = write_factored(spec, work, stage.path, reporter)
            result = work.result()
        elif spec.chosen_strategy.drops_layers:
            work = work.with_layers(choose_layers(spec, work, stage.path, reporter))
            assert work.kept_layers is not None
            digests = write_layers(spec, work, stage.path, reporter)
            draw_kept(work.before.layers, work.after, stage.path / "kept.png")
            result, kept = work.result(), layers_record(work.kept_layers)
        else:
            keep = choose_groups(spec, work, stage.path, reporter)
            work = work.with_keep(keep)
            digests = write_kept(spec, work, keep, stage.path, reporter)
            draw_kept(work.before.layers, work.after, stage.path / "kept.png")
            result = work.result()
            kept = {str(i): layer.to_mapping() for i, layer in keep.items()}
        (stage.path / "config.json").write_text(json.dumps(work.config, indent=2) + "\n")
        copy_companions(spec.read, stage.path)
        return stage.commit(result, keep=kept, sparsity=sparsity, digests=digests)
