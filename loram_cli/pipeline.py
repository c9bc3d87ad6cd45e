"""Run the stages of a recipe; what is done is skipped, what was interrupted goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.config import defaults as resolve
from loram_cli.config.recipe import Recipe
from loram_cli.reporting import Reporter
from loram_cli.runs.rundir import RunDirectory
from loram_cli.schema import spec_from_mapping
from loram_cli.stages.align import stage as align
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.stages.evaluate import stage as evaluate
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.prune.widths import DEFAULT_RATIO, choose_widths
from loram_cli.stages.recover import merge
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train


@dataclass(frozen=True)
class DryRun:
    """What a recipe would do.

    Attributes:
        stages: Names in order.
        values: The values that each one sets.
        base_params: Parameters of the base.
        pruned_params: Parameters to train on.
        pruned_weight_bytes: Their memory in bf16.
        nf4_weight_bytes: Their memory in NF4, by the paper's count.
    """

    stages: tuple[str, ...]
    values: dict[str, dict[str, Any]]
    base_params: int
    pruned_params: int
    pruned_weight_bytes: int
    nf4_weight_bytes: int


def dry_run(recipe: Recipe) -> DryRun:
    """Plan a recipe from its preset or from its base's config, without reading weights.

    Raises:
        LoramError: The base is not at hand and the recipe names no preset.
        UsageError: Ratio or keep flags do not fit the model.
    """
    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import read_config
    from loram_cli.memory.account import count_nonzero_params, count_params
    from loram_cli.memory.presets import load_preset
    from loram_cli.pruning.plan import pruned_config

    config = (
        load_preset(recipe.preset)
        if recipe.preset
        else read_config(resolve.model_dir(recipe.model))
    )
    family = family_for(config, recipe.model)
    section = recipe.section("prune")
    if section.get("strategy") in resolve.SPARSE:
        ratio = section.get("ratio", 0.5 if section["strategy"] == "semi" else DEFAULT_RATIO)
        base = count_params(family, config).total
        pruned = count_nonzero_params(family, config, ratio).total
        values = {stage: recipe.section(stage) for stage in recipe.stages}
        # Zeros take their place: memory is the base's.
        return DryRun(recipe.stages, values, base, pruned, base * 2, base // 2)
    # Where the model lies plays no part in its widths.
    spec = spec_from_mapping(
        prune.PruneSpec, {**section, "model": Path(), "out": Path()}, "recipe, stage prune"
    )
    geometry = family.geometry(config)
    widths = choose_widths(spec, family, config).after
    narrow = pruned_config(config, geometry, widths)
    base, pruned = (count_params(family, c).total for c in (config, narrow))
    values = {stage: recipe.section(stage) for stage in recipe.stages}
    return DryRun(recipe.stages, values, base, pruned, pruned * 2, pruned // 2)


def run(
    recipe: Recipe,
    directory: RunDirectory,
    *,
    force: bool,
    reporter: Reporter,
    on_result: Callable[[StageResult], None],
) -> list[StageResult]:
    """Run every stage of a recipe in order.

    Args:
        recipe: What to run.
        directory: Where outputs go.
        force: Redo every stage.
        reporter: Told of progress.
        on_result: Called after each stage.

    Raises:
        LoramError: A stage failed; what was done before it stays done.
    """
    model = directory.settle_model(recipe.model)
    results: list[StageResult] = []
    for stage in recipe.stages:
        for result in _run_stage(stage, recipe, directory, model, force, reporter):
            on_result(result)
            results.append(result)
    return results


def _run_stage(
    stage: str,
    recipe: Recipe,
    directory: RunDirectory,
    model: str,
    force: bool,
    reporter: Reporter,
) -> list[StageResult]:
    values = {**recipe.section(stage), "force": force}
    if stage == "prune":
        return [prune.run(resolve.prune_spec(directory, model, values), reporter)]
    if stage == "align":
        return [align.run(resolve.align_spec(directory, model, values), reporter)]
    if stage == "train":
        return [train.run(resolve.train_spec(directory, model, values), reporter)]
    if stage == "full_lora":
        return [train.run(resolve.full_lora_spec(directory, model, values), reporter)]
    if stage == "recover":
        merges = values.pop("merge", False)
        results = [recover.run(resolve.recover_spec(directory, model, values), reporter)]
        if merges:
            merging = resolve.merge_spec(directory, model, {"force": force})
            results.append(merge.run(merging, reporter))
        return results
    return [evaluate.run(resolve.eval_spec(directory, model, values), reporter)]
