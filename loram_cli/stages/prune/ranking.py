"""Rank the groups of every pruned layer: by magnitude, or by gradients on calibration text."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loram_cli.reporting import Reporter

if TYPE_CHECKING:
    from loram_cli.arch.spec import LinearModule
    from loram_cli.pruning.scores import LayerScores, SalienceSums
    from loram_cli.stages.prune.plan import PrunePlan
    from loram_cli.stages.prune.stage import PruneSpec


def group_scores(
    spec: "PruneSpec", planned: "PrunePlan", layers: range, work: Path, reporter: Reporter
) -> "dict[int, LayerScores]":
    """Score every group of the given layers as ``spec.importance`` says.

    Args:
        spec: How to prune.
        planned: The base and its widths.
        layers: The layers to be pruned.
        work: The directory being written, for what does not fit the calibration's memory.
        reporter: Told of progress.

    Returns:
        Group scores by layer.

    Raises:
        LoramError: The calibration text is unusable, or the loss on it is not finite.
    """
    score = _taylor_scores if spec.needs_calibration else _l2_scores
    return score(spec, planned, layers, work, reporter)


def _l2_scores(
    spec: "PruneSpec", planned: "PrunePlan", layers: range, work: Path, reporter: Reporter
) -> "dict[int, LayerScores]":
    from loram_cli.checkpoint.background import one_torch_thread
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.pruning.scores import l2_sums, layer_scores_from_sums

    scores = {}
    with (
        TensorReader(planned.index) as reader,
        reporter.progress("rank", len(layers), "layer") as bar,
        one_torch_thread(),
    ):

        def sums(layer: int, module: "LinearModule") -> "SalienceSums":
            name = f"{planned.family.layer_prefix(layer)}{module.name}.weight"
            return l2_sums(chunk for _, chunk in reader.read_chunks(name))

        for i in layers:
            scores[i] = layer_scores_from_sums(
                planned.family, planned.before.layers[i], partial(sums, i)
            )
            bar.advance()
    return scores


def _taylor_scores(
    spec: "PruneSpec", planned: "PrunePlan", layers: range, work: Path, reporter: Reporter
) -> "dict[int, LayerScores]":
    from loram_cli.modeling.layerwise.gradients import layer_gradients
    from loram_cli.modeling.layerwise.stream import LayerStream
    from loram_cli.pruning.scores import layer_scores, taylor_salience
    from loram_cli.stages.prune.calibration import load_windows, open_pool

    assert planned.calibration is not None
    windows = load_windows(spec, planned.calibration)
    family = planned.family
    modules = [module.name for module in family.modules if module.rows or module.columns]
    scores = {}
    with (
        LayerStream(spec.model, spec.device) as stream,
        open_pool(spec, planned.calibration, stream, work) as pool,
    ):
        for i, gradients in layer_gradients(stream, windows, layers, modules, pool, reporter):
            scores[i] = layer_scores(
                family,
                planned.before.layers[i],
                lambda module, gradients=gradients: taylor_salience(*gradients[module.name]).cpu(),
            )
    return scores
