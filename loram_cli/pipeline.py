"""Run the stages of a recipe; what is done is skipped, what was interrupted resumes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.index import read_config
from loram_cli.config.defaults import FILL, POLISHED_ALIKE, Place, merge_spec, model_dir
from loram_cli.config.recipe import FULL_LORA, SPECS, Recipe, checked_by_stand_ins
from loram_cli.memory.presets import load_preset
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME
from loram_cli.runs.rundir import OUTPUTS, RunDirectory
from loram_cli.stages.align import stage as align
from loram_cli.stages.core.data_digests import DATA_SETTINGS
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.stages.core.plan import StagePlan, free_disk
from loram_cli.stages.evaluate import stage as evaluate
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.prune.plan import chosen_way
from loram_cli.stages.prune.plan import foresee as foresee_prune
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.stages.recover import merge
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.stages.train.spec import TrainSpec
from loram_cli.training.data.sources import data_files

# A module for each stage: its ``plan`` and its ``run``.
STAGES: dict[str, Any] = {
    "prune": prune,
    "align": align,
    "train": train,
    FULL_LORA: train,
    "recover": recover,
    "polish": train,
    "eval": evaluate,
}


def run(
    recipe: Recipe,
    directory: RunDirectory,
    *,
    force: bool,
    reporter: Reporter,
    on_result: Callable[[StageResult], None],
) -> list[StageResult]:
    """Run every stage of a recipe in order.

    Raises:
        LoramError: A stage failed; what was done before it stays done.
    """
    _check_ahead(recipe, Place(directory, directory.settle_model(recipe.model, remember=False)))
    place = Place(directory, directory.settle_model(recipe.model))
    results: list[StageResult] = []
    before: Path | None = None
    for stage in recipe.stages:
        spec = _spec(recipe, stage, place, before, force=force)
        if _kind(recipe, stage) == "train":
            before = spec.out
        results.append(STAGES[_kind(recipe, stage)].run(spec, reporter))
        on_result(results[-1])
        merging = merge_spec(place, spec) if stage == "recover" else None
        if merging is not None:
            results.append(merge.run(merging, reporter))
            on_result(results[-1])
    return results


def plan(recipe: Recipe, directory: RunDirectory, reporter: Reporter) -> list[StagePlan[Any]]:
    """Plan every stage of a recipe: from its inputs where they are there, else by arithmetic.

    A recipe that names a preset is planned without its base's weights.

    Raises:
        LoramError: The base is not at hand and the recipe names no preset, or a stage would refuse
            what is there.
        UsageError: Settings do not fit the model.
    """
    place = Place(directory, directory.settle_model(recipe.model, remember=False))
    if recipe.preset is None:
        model_dir(place.model)
        _check_ahead(recipe, place)
    return list(_plans(recipe, place, reporter))


def _check_ahead(recipe: Recipe, place: Place) -> None:
    """Refuse at the start what a later stage would refuse after hours.

    Raises:
        LoramError: Data of a stage is not there.
        UsageError: A task is unknown, or its settings do not go together.
    """
    for stage in recipe.stages:
        values = recipe.filled(stage)
        for name in DATA_SETTINGS:
            if values.get(name):
                data_files(values[name])
    if recipe.eval is not None:
        evaluate.check_tasks(_spec(recipe, "eval", place, None))


def _kind(recipe: Recipe, stage: str) -> str:
    """The stage that a name in a recipe stands for: further trainings are ``train``."""
    return "train" if stage in recipe.further else stage


def _spec(recipe: Recipe, stage: str, place: Place, before: Path | None, **more: Any) -> Any:
    """A stage's spec; a further training starts from the adapter before it."""
    values = {**recipe.filled(stage), **more}
    if stage in recipe.further:
        values.setdefault("from_adapter", before)
    return FILL[_kind(recipe, stage)](place, values)


def _plans(recipe: Recipe, place: Place, reporter: Reporter) -> Iterator[StagePlan[Any]]:
    base = load_preset(recipe.preset) if recipe.preset else read_config(model_dir(place.model))
    small: Mapping[str, Any] = base
    before: Path | None = None
    for stage in recipe.stages:
        values = recipe.filled(stage)
        kind = _kind(recipe, stage)
        if recipe.preset is None and _has_inputs(stage, recipe, place):
            planned = STAGES[kind].plan(_spec(recipe, stage, place, before), reporter)
            before = _out(stage, place) if kind == "train" else before
            if stage == "prune":
                small = planned.work.config
            yield planned
            continue
        if stage == "polish":
            alike = {k: v for k, v in recipe.section("train").items() if k in POLISHED_ALIKE}
            values = {**alike, **values}
        before = _out(stage, place) if kind == "train" else before
        yield _foreseen(stage, kind, values, place, base, small)
        if stage == "prune":
            spec = checked_by_stand_ins(PruneSpec, values, "recipe, stage prune")
            assert isinstance(spec, PruneSpec)
            small = foresee_prune(spec.settled(), base)[0]


def _has_inputs(stage: str, recipe: Recipe, place: Place) -> bool:
    """Whether what a stage reads is there already."""
    if stage in ("prune", FULL_LORA):
        return True
    order = [name for name in recipe.stages if name != FULL_LORA]
    needed = [name for name in order[: order.index(stage)] if name != "eval"]
    return all((_out(name, place) / MANIFEST_NAME).is_file() for name in needed)


def _out(stage: str, place: Place) -> Path:
    """Where a stage of a recipe writes."""
    if stage == FULL_LORA:
        return place.run.path / "full-lora"
    if stage in OUTPUTS:
        return place.run.output(stage)
    return place.run.path / stage.replace("train", OUTPUTS["train"], 1)


def _foreseen(
    stage: str,
    kind: str,
    values: Mapping[str, Any],
    place: Place,
    base: Mapping[str, Any],
    small: Mapping[str, Any],
) -> StagePlan[None]:
    """A stage's plan by arithmetic: its inputs are still to be made."""
    own = "train" if stage == FULL_LORA else kind
    spec = checked_by_stand_ins(SPECS[own], values, f"recipe, stage {own}").settled()
    figures: dict[str, Any] = {"settings": dict(values)}
    memory_bytes = 0
    if isinstance(spec, PruneSpec):
        figures["result"] = foresee_prune(spec, base)[1]
        way = chosen_way(spec, base)
        figures |= {"way": way.said} if way else {}
    if isinstance(spec, TrainSpec):
        config = base if stage in (FULL_LORA, "polish") else small
        figures |= train.foresee(spec, config)
        memory_bytes = figures.pop("memory_bytes")
    out = _out(stage, place)
    return StagePlan(
        stage=own,
        reads=tuple(str(v) for k, v in values.items() if k in ("data", "eval_data", "calibration")),
        writes=out,
        work=None,
        checked=False,
        free_bytes=free_disk(out),
        memory_bytes=memory_bytes,
        figures=figures,
    )
