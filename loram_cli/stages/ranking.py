"""Rank the groups of every pruned layer: by magnitude, or by gradients on calibration text."""

from typing import TYPE_CHECKING

from loram_cli.reporting import Reporter

if TYPE_CHECKING:
    from loram_cli.pruning.scores import LayerScores
    from loram_cli.stages.prune import PrunePlan, PruneSpec


def group_scores(
    spec: "PruneSpec", planned: "PrunePlan", layers: range, reporter: Reporter
) -> "dict[int, LayerScores]":
    """Score every group of the given layers as ``spec.importance`` says.

    Args:
        spec: How to prune.
        planned: The base and its widths.
        layers: The layers to be pruned.
        reporter: Told of progress.

    Returns:
        Group scores by layer.

    Raises:
        LoramError: The calibration text is unusable, or the loss on it is not finite.
    """
    score = _taylor_scores if spec.needs_calibration else _l2_scores
    return score(spec, planned, layers, reporter)


def _l2_scores(
    spec: "PruneSpec", planned: "PrunePlan", layers: range, reporter: Reporter
) -> "dict[int, LayerScores]":
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.pruning.scores import l2_salience, layer_scores

    scores = {}
    with (
        TensorReader(planned.index) as reader,
        reporter.progress("rank", len(layers), "layer") as bar,
    ):
        for i in layers:
            prefix = planned.family.layer_prefix(i)
            scores[i] = layer_scores(
                planned.family,
                planned.before.layers[i],
                lambda module, prefix=prefix: l2_salience(
                    reader.read(f"{prefix}{module.name}.weight")
                ),
            )
            bar.advance()
    return scores


def _taylor_scores(
    spec: "PruneSpec", planned: "PrunePlan", layers: range, reporter: Reporter
) -> "dict[int, LayerScores]":
    from loram_cli.modeling.gradients import loss_gradients
    from loram_cli.modeling.narrow import load_causal_lm, load_tokenizer
    from loram_cli.pruning.calibrate import calibration_windows
    from loram_cli.pruning.scores import layer_scores, taylor_salience
    from loram_cli.training.data import load_text

    assert spec.calibration is not None
    texts = load_text(spec.calibration)
    windows = calibration_windows(
        texts,
        load_tokenizer(spec.model),
        spec.calibration_samples,
        spec.calibration_length,
        spec.seed,
    )
    model = load_causal_lm(spec.model)
    family = planned.family
    names = [
        f"{family.layer_prefix(i)}{module.name}.weight" for i in layers for module in family.modules
    ]
    scores = {}
    with loss_gradients(model, names, windows, reporter) as gradients:
        for i in layers:
            prefix = family.layer_prefix(i)
            scores[i] = layer_scores(
                family,
                planned.before.layers[i],
                lambda module, prefix=prefix: taylor_salience(
                    *gradients[f"{prefix}{module.name}.weight"]
                ).cpu(),
            )
    return scores
