"""A budget in place of a ratio, as ``prune`` is given it: parameters, or a card's memory."""

from collections.abc import Callable, Mapping
from typing import Any

from loram_cli.arch.spec import Family, Geometry, LayerGeometry
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.memory.setup import TrainingSetup, usual_attention
from loram_cli.pruning.budget import card_bytes, largest_ratio, smallest_ratio
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.stages.fit.spec import smaller_trainings
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.units import format_bytes, format_params

Widths = tuple[LayerGeometry, ...]


def budget_excess(
    spec: PruneSpec, family: Family, config: Mapping[str, Any]
) -> Callable[[Widths], int] | None:
    """By how much a model of given widths exceeds the budget, in parameters or bytes.

    Returns:
        The function of the widths; None where the spec names no budget.
    """
    geometry = family.geometry(config)
    if spec.target_params is not None:
        budget: int = spec.target_params
    elif spec.fit_memory is not None:
        budget = spec.fit_memory
    else:
        return None
    setup = training_setup(spec, config)

    def excess(widths: Widths) -> int:
        small = pruned_config(config, geometry, widths)
        if spec.target_params is not None:
            return count_params(family, small).total - budget
        return card_bytes(family, small, setup) - budget

    return excess


def training_setup(spec: PruneSpec, config: Mapping[str, Any]) -> TrainingSetup:
    """The training that the small model is meant for, on a GPU."""
    return TrainingSetup(
        rank=spec.rank,
        quantize=spec.quantize,
        micro_batch=spec.micro_batch,
        length=spec.max_length,
        gradient_checkpointing=spec.gradient_checkpointing,
        attention=usual_attention(config),
    )


def ratio_of_budget(
    spec: PruneSpec,
    geometry: Geometry,
    over_budget: Callable[[Widths], int],
) -> float:
    """The smallest ratio that meets the budget.

    Raises:
        UsageError: The whole base meets it, or nothing does.
    """

    def said(amount: int) -> str:
        return format_bytes(amount) if spec.fit_memory is not None else format_params(amount)

    budget = spec.fit_memory or spec.target_params
    assert budget is not None
    asked = f"{'--fit-memory' if spec.fit_memory else '--target-params'} {said(budget)}"
    over = over_budget(geometry.layers)
    if over <= 0:
        raise UsageError(
            f"{asked}: the whole base takes {said(budget + over)} and fits already",
            "train on it as it is, or pass --ratio",
        )
    how = (*spec.kept_whole, spec.multiple_of, spec.uniform)
    ratio = smallest_ratio(
        geometry,
        *spec.kept_whole,
        lambda widths: over_budget(widths) <= 0,
        spec.multiple_of,
        spec.uniform,
    )
    if ratio is None:
        least = budget + over_budget(layer_widths(geometry, largest_ratio(geometry), *how))
        smaller = ""
        if spec.fit_memory:
            left = smaller_trainings(spec)
            smaller = f", or add {' '.join(left)}" if left else ""
        raise UsageError(
            f"{asked}: even at one head and hardly a channel a layer it takes {said(least)}",
            f"pass a larger budget, lower --keep-first and --keep-last{smaller}",
        )
    return ratio
