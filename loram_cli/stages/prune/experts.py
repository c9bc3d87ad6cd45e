"""Choose the experts that stay: drawn, or ranked by what they add to their layer's output."""

from pathlib import Path
from typing import cast

import torch

from loram_cli.modeling.layerwise.expert_scores import expert_scores, expert_taylor
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.pruning.experts import (
    ExpertImportance,
    draw_experts,
    keep_experts,
    keep_experts_globally,
)
from loram_cli.reporting import Reporter
from loram_cli.stages.prune.calibration import load_windows, open_pool
from loram_cli.stages.prune.plan import PruneWork
from loram_cli.stages.prune.spec import PruneSpec


def choose_experts(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> dict[int, tuple[int, ...]]:
    """Sorted indices of the experts that stay, of every layer that has some.

    Raises:
        LoramError: The calibration text is unusable.
    """
    before, after = work.before.layers, work.after
    layers = {i: layer for i, layer in enumerate(before) if layer.has_experts}
    assert spec.experts_ratio is not None
    if spec.experts_method == "rand":
        return {
            i: draw_experts(layer, after[i].num_experts, seed=spec.seed, index=i)
            for i, layer in layers.items()
        }
    scores = _scores(spec, work, list(layers), directory, reporter)
    if spec.scope == "global":
        return keep_experts_globally(layers, scores, spec.experts_ratio)
    return {i: keep_experts(layer, scores[i], after[i].num_experts) for i, layer in layers.items()}


def _scores(
    spec: PruneSpec, work: PruneWork, layers: list[int], directory: Path, reporter: Reporter
) -> dict[int, torch.Tensor]:
    experts = work.model.family.experts
    assert experts is not None and work.expert_calibration is not None
    windows = load_windows(spec, work.expert_calibration)
    importance = cast(ExpertImportance, spec.experts_method)
    with (
        LayerStream(work.model, spec.device) as stream,
        open_pool(spec, work.expert_calibration, stream, directory) as pool,
    ):
        if importance == "taylor":
            return expert_taylor(stream, experts, windows, layers, pool, reporter)
        return dict(expert_scores(stream, experts, windows, layers, importance, pool, reporter))
