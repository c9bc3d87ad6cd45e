"""Drop whole groups: score them, choose what stays, and write it, some rows at a time."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from loram_cli.arch.spec import PRUNED_AXES, LayerGeometry, LinearModule
from loram_cli.checkpoint.background import one_torch_thread, read_ahead
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter
from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.gradients import layer_gradients
from loram_cli.modeling.layerwise.sparsegpt_pass import changed_layers
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.pruning.column_scores import obs_scores, wanda_scores
from loram_cli.pruning.groups import LayerKeep, params_per_group
from loram_cli.pruning.plan import pruned_layers
from loram_cli.pruning.scores import (
    LayerScores,
    SalienceSums,
    l2_sums,
    layer_scores,
    layer_scores_from_sums,
    scored_modules,
    taylor_salience,
)
from loram_cli.pruning.select import keep_global
from loram_cli.pruning.slicing import read_kept
from loram_cli.pruning.sparsegpt import Hessian
from loram_cli.pruning.strategy import LayerToPrune
from loram_cli.reporting import Reporter
from loram_cli.stages.prune.calibration import load_windows, open_pool
from loram_cli.stages.prune.experts import choose_experts
from loram_cli.stages.prune.plan import PruneWork
from loram_cli.stages.prune.spec import PruneSpec

Gradients = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Weight and gradient by a module's name."""


def choose_groups(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> dict[int, LayerKeep]:
    """What stays of each layer, as the strategy says.

    Raises:
        LoramError: The calibration text is unusable, the loss on it is not finite, or a budget
            cannot be met.
    """
    keep = {} if spec.experts_only else _choose_heads_and_channels(spec, work, directory, reporter)
    if spec.experts_ratio is None:
        return keep
    return _with_experts(keep, work, choose_experts(spec, work, directory, reporter))


def _with_experts(
    keep: dict[int, LayerKeep], work: PruneWork, experts: Mapping[int, tuple[int, ...]]
) -> dict[int, LayerKeep]:
    """What stays of each layer, with the experts that do."""
    before = work.before.layers
    chosen = {
        i: replace(keep.get(i) or LayerKeep.whole(before[i]), experts=kept)
        for i, kept in experts.items()
    }
    return dict(sorted({**keep, **chosen}.items()))


def _choose_heads_and_channels(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> dict[int, LayerKeep]:
    strategy = spec.chosen_strategy
    assert strategy.keep is not None
    layers = _layers(spec, work)
    scores: dict[int, LayerScores] = {}
    before = work.before.layers
    if strategy.importances:
        assert spec.method is not None
        score = _SCORES[spec.method]
        scores = score(spec, work, layers, directory, reporter)
    if spec.scope == "global":
        return _rank_globally(work, scores, spec.multiple_of)
    if strategy.importances:
        # A layer of a kind that has nothing to rank keeps what it has.
        scores = {i: _no_scores(before[i]) for i in layers} | scores
    return {
        i: strategy.keep(LayerToPrune(i, before[i], work.after[i], scores.get(i), spec.seed))
        for i in layers
    }


def write_kept(
    spec: PruneSpec,
    work: PruneWork,
    keep: dict[int, LayerKeep],
    directory: Path,
    reporter: Reporter,
) -> dict[str, str]:
    """Write the rows and columns that stay, shard by shard.

    Returns:
        SHA-256 in hex of every shard.
    """
    with (
        TensorReader(work.model.index, once=True) as reader,
        ShardedWriter(directory, work.tensors, spec.max_shard_bytes) as writer,
        reporter.progress("write", work.out_bytes / 2**20, "MiB") as progress,
        read_ahead(
            (name, rows)
            for name in work.tensors
            for rows in read_kept(reader, name, work.model.family, work.before, keep)
        ) as kept,
    ):
        for name, rows in kept:
            writer.write(name, rows)
            progress.advance(rows.nbytes / 2**20)
    return writer.digests


def _no_scores(layer: LayerGeometry) -> LayerScores:
    return {
        "key_value": torch.zeros(layer.num_key_value_heads, dtype=torch.float64),
        "intermediate": torch.zeros(layer.intermediate_size, dtype=torch.float64),
    }


def _layers(spec: PruneSpec, work: PruneWork) -> range:
    """From the first to the last layer that may lose something."""
    if spec.plan is not None:
        return range(work.pruned_layers[0], work.pruned_layers[-1] + 1)
    return pruned_layers(len(work.before.layers), *spec.kept_whole)


def _l2_scores(
    spec: PruneSpec, work: PruneWork, layers: range, directory: Path, reporter: Reporter
) -> dict[int, LayerScores]:
    family = work.model.family
    scores = {}
    with (
        TensorReader(work.model.index) as reader,
        reporter.progress("rank", len(layers), "layer") as bar,
        one_torch_thread(),
    ):

        def sums(layer: int, module: LinearModule) -> SalienceSums:
            name = f"{family.layer_prefix(layer)}{module.name}.weight"
            return l2_sums(chunk for _, chunk in reader.read_chunks(name))

        for i in layers:
            scores[i] = layer_scores_from_sums(family, work.before.layers[i], partial(sums, i))
            bar.advance()
    return scores


def _taylor_scores(
    spec: PruneSpec, work: PruneWork, layers: range, directory: Path, reporter: Reporter
) -> dict[int, LayerScores]:
    assert work.calibration is not None
    windows = load_windows(spec, work.calibration)
    family = work.model.family
    # Of layers of all kinds; each layer gives those that it has.
    modules = list(
        dict.fromkeys(
            module.name for layer in work.before.layers for module in scored_modules(family, layer)
        )
    )
    scores = {}
    with (
        LayerStream(work.model, spec.device) as stream,
        open_pool(spec, work.calibration, stream, directory) as pool,
    ):

        def salience(
            gradients: dict[str, tuple[torch.Tensor, torch.Tensor]], module: LinearModule
        ) -> torch.Tensor:
            return taylor_salience(*gradients[module.name]).cpu()

        for i, gradients in layer_gradients(stream, windows, layers, modules, pool, reporter):
            scores[i] = layer_scores(family, work.before.layers[i], partial(salience, gradients))
    return scores


def _column_scores(
    spec: PruneSpec, work: PruneWork, layers: range, directory: Path, reporter: Reporter
) -> dict[int, LayerScores]:
    """Scores from what goes into the modules whose input is cut, and their weights."""
    assert work.calibration is not None
    windows = load_windows(spec, work.calibration)
    family, before = work.model.family, work.before.layers
    axes = {m.name: axis for m in family.modules if (axis := _group_axis(m)) is not None}
    scores = {i: _no_scores(before[i]) for i in layers}

    def rank(weights: dict[str, torch.Tensor], hessian: Hessian) -> dict[str, torch.Tensor]:
        for name, weight in weights.items():
            found = family.module_named(name.removesuffix(".weight"))
            assert found is not None
            layer, module = found
            if layer in scores:
                mine = scores[layer][axes[module.name]]
                if spec.method == "wanda":
                    mine += wanda_scores(weight, hessian.total, len(mine)).cpu()
                else:
                    mine += obs_scores(weight, hessian.total, len(mine), spec.dampening).cpu()
        return {}

    with (
        LayerStream(work.model, spec.device) as stream,
        open_pool(spec, work.calibration, stream, directory) as pool,
    ):
        for _ in changed_layers(stream, windows, tuple(axes), rank, pool, reporter):
            pass
    return scores


def _group_axis(module: LinearModule) -> str | None:
    """The groups that a module's input runs over; None where it is not cut."""
    if len(module.columns) != 1 or module.columns[0] not in PRUNED_AXES:
        return None
    return "intermediate" if module.columns[0] == "intermediate" else "key_value"


_SCORES = {
    "l2": _l2_scores,
    "taylor": _taylor_scores,
    "wanda": _column_scores,
    "obs": _column_scores,
}


def _rank_globally(
    work: PruneWork, scores: dict[int, LayerScores], multiple_of: int
) -> dict[int, LayerKeep]:
    """Choose among the groups of all layers together, until the budget is met.

    Raises:
        LoramError: One head and one channel in each layer are too much still.
    """
    assert work.chosen is not None
    model, before = work.model, work.before.layers
    freed = {i: params_per_group(model.family, model.config, before[i]) for i in scores}
    remove_params = work.chosen.remove_params
    while True:
        keep = keep_global(scores, freed, remove_params, multiple_of)
        over = work.chosen.over_budget(work.with_keep(keep).after)
        if over <= 0:
            return keep
        if all(
            len(k.key_value_heads) == 1 and len(k.intermediate) <= multiple_of
            for k in keep.values()
        ):
            raise LoramError(
                "the budget cannot be met by ranking all layers together", "pass --scope layer"
            )
        # In bytes or in parameters: a parameter less is two bytes less in bf16.
        remove_params += max(1, over // 2)
