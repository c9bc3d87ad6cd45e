"""How wide each layer becomes: a ratio, a plan file, or the smallest ratio that meets a budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli import reading
from loram_cli.arch.spec import Family, LayerGeometry
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_params
from loram_cli.pruning.budget import smallest_ratio
from loram_cli.pruning.experts import without_experts
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.pruning.ratios import RatioPlan
from loram_cli.schema import digest_of
from loram_cli.stages.prune.budgets import budget_excess, ratio_of_budget
from loram_cli.stages.prune.spec import PruneSpec

Widths = tuple[LayerGeometry, ...]


def read_plan(file: Path) -> Any:
    """Parse a plan file, YAML or JSON; what it says is checked by ``RatioPlan``.

    Raises:
        UsageError: See :func:`.reading.read_yaml`.
    """
    try:
        return _text_keys(reading.read_yaml(file))
    except UsageError as error:
        raise UsageError(f"--plan {error.message}", error.hint) from error


def _text_keys(value: Any) -> Any:
    """YAML reads the layer 7 as a number and 4-9 as text."""
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class ChosenWidths:
    """What each layer keeps.

    Attributes:
        after: Widths of every layer after pruning. With a global scope they are the even share of
            what goes; the ranking moves them.
        ratio: The ratio that gave them; None with a plan file, and where only experts go.
        experts_ratio: Share of experts that goes; None where all stay.
        remove_params: At least how many parameters go.
        scope: ``layer`` or ``global``.
        fit_bytes: Memory of the card to train on; None without such a budget.
        over_budget: By how much a model of given widths exceeds the budget, in parameters or
            bytes; 0 or less where it fits, and always 0 without a budget.
    """

    after: Widths
    ratio: float | None
    experts_ratio: float | None
    remove_params: int
    scope: str
    fit_bytes: int | None
    over_budget: Callable[[Widths], int]

    def known(self, after: Widths) -> dict[str, Any]:
        """Fields of the result, with the least card where that is the budget."""
        card_bytes = None
        if self.fit_bytes is not None:
            card_bytes = self.fit_bytes + self.over_budget(after)
        return {
            "ratio": self.ratio,
            "experts_ratio": self.experts_ratio,
            "scope": self.scope,
            "remove_params": self.remove_params,
            "card_bytes": card_bytes,
        }


def choose_widths(spec: PruneSpec, family: Family, config: Mapping[str, Any]) -> ChosenWidths:
    """Widths of every layer after pruning.

    Raises:
        UsageError: What is asked for does not fit the model, or cannot be reached.
    """
    geometry = family.geometry(config)
    over_budget = budget_excess(spec, family, config)
    ratio = spec.ratio
    if spec.plan is not None:
        ratio = None
        plan = RatioPlan.from_mapping(read_plan(spec.plan), f"plan {spec.plan.name}")
        after = plan.widths(geometry, *spec.kept_whole, spec.multiple_of)
        if after == geometry.layers:
            raise UsageError(f"plan {spec.plan.name}: drops nothing from this model")
    elif spec.experts_only:
        after = geometry.layers
    else:
        if over_budget is not None:
            ratio = ratio_of_budget(spec, geometry, over_budget)
        elif spec.uniform:
            ratio = _uniform_ratio(spec, family, config)
        assert ratio is not None
        how = (*spec.kept_whole, spec.multiple_of, spec.uniform)
        after = layer_widths(geometry, ratio, *how)
        if after == geometry.layers and spec.multiple_of > 1:
            raise UsageError(
                f"--multiple-of {spec.multiple_of} keeps everything at this ratio",
                "pass a smaller one, or a higher --ratio",
            )
        if after == geometry.layers and ratio > 0:
            raise UsageError(
                f"--ratio {ratio:g} drops nothing: the layers between --keep-first and --keep-last "
                "have no heads and no channels that can go, or too few",
                "leave --ratio out, and pass --experts-ratio"
                if any(layer.has_experts for layer in after)
                else "pass a higher one",
            )
    if spec.experts_ratio is not None:
        if spec.scope == "global" and any(layer.expert_groups > 1 for layer in after):
            raise UsageError(
                "--scope global: this model's router picks among groups of experts, which must "
                "stay equally many in each",
                "leave --scope out",
            )
        after = without_experts(after, spec.experts_ratio, family.family)
    base, pruned = (
        count_params(family, c).total for c in (config, pruned_config(config, geometry, after))
    )
    remove_params = base - pruned
    if spec.target_params is not None:
        remove_params = base - spec.target_params
    return ChosenWidths(
        after,
        ratio,
        spec.experts_ratio,
        remove_params,
        spec.scope,
        spec.fit_memory,
        over_budget or (lambda _: 0),
    )


def _uniform_ratio(spec: PruneSpec, family: Family, config: Mapping[str, Any]) -> float:
    """The ratio that takes from all layers together what ``--ratio`` takes from the inner ones.

    Raises:
        UsageError: There is none.
    """
    geometry = family.geometry(config)
    assert spec.ratio is not None
    keeps = (spec.keep_first, spec.keep_last)
    inner = layer_widths(geometry, spec.ratio, *keeps, spec.multiple_of)

    def params(widths: Widths) -> int:
        return count_params(family, pruned_config(config, geometry, widths)).total

    budget = params(inner)
    ratio = smallest_ratio(
        geometry,
        *spec.kept_whole,
        lambda widths: params(widths) <= budget,
        spec.multiple_of,
        spec.uniform,
    )
    if ratio is None:
        raise UsageError(
            f"--uniform: what --ratio {spec.ratio:g} takes from the inner layers cannot be taken "
            "from all layers alike",
            "pass a lower --ratio",
        )
    return ratio


def plan_record(spec: PruneSpec) -> dict[str, dict[str, str]]:
    """The manifest's record of the plan file: the same ratios are the same input."""
    if spec.plan is None:
        return {}
    return {"plan": {"path": str(spec.plan), "ratios": digest_of(read_plan(spec.plan))}}
