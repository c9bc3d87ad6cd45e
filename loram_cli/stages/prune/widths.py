"""How wide each layer becomes: a ratio, a plan file, or the smallest ratio that meets a budget."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import LoramError, UsageError
from loram_cli.schema import digest_of
from loram_cli.stages.core.lifecycle import settle_amount
from loram_cli.units import parse_bytes, parse_params

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family, LayerGeometry
    from loram_cli.pruning.groups import LayerKeep
    from loram_cli.pruning.scores import LayerScores
    from loram_cli.stages.prune.plan import PrunePlan
    from loram_cli.stages.prune.stage import PruneSpec

AMOUNTS = ("ratio", "plan", "target_params", "fit_memory")
# What a budget of memory depends on.
_TRAINING = ("quantize", "rank", "micro_batch", "max_length", "gradient_checkpointing")
FLAGS = ("--plan", "--target-params", "--fit-memory")
DEFAULT_RATIO = 0.65


def check_amount(spec: "PruneSpec") -> None:
    """Refuse two ways to say how much goes, and values out of range.

    Raises:
        UsageError: More than one of :data:`AMOUNTS`, or one that cannot be.
    """
    given = [name for name in AMOUNTS if getattr(spec, name) is not None]
    if len(given) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{flags} exclude each other", "pass one of them")
    if spec.ratio is not None and not 0 < spec.ratio < 1:
        raise UsageError(f"--ratio {spec.ratio} is outside (0, 1)")
    for name in ("target_params", "fit_memory"):
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0")
    defaults = {field.name: field.default for field in fields(spec)}
    for name in _TRAINING:
        value = getattr(spec, name)
        if spec.fit_memory is None and value != defaults[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} tells --fit-memory how training will go; pruning "
                "itself does not depend on it",
                "pass it to 'loram train', or add --fit-memory",
            )
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is too low")
    if spec.zeroes_weights:
        others = (("scope", "--scope global"), ("multiple_of", "--multiple-of"))
        for name, flag in (*zip(AMOUNTS[1:], FLAGS, strict=True), *others):
            if getattr(spec, name) not in (None, "layer", 1):
                raise UsageError(
                    f"{flag} does not go with --strategy {spec.strategy}: shapes and memory stay",
                    "pass --ratio, or --strategy stru",
                )
    if spec.scope == "global" and spec.strategy == "rand":
        raise UsageError(
            "--scope global ranks groups, and --strategy rand draws them",
            "pass --strategy stru, or --plan FILE for ratios of your own",
        )
    if spec.scope == "global" and spec.plan is not None:
        raise UsageError(
            "--scope global shares one budget among the layers, and --plan says what each loses",
            "pass one of them",
        )


def settle_amounts(spec: "PruneSpec") -> None:
    """Turn budgets that are written with a unit into numbers, and set the default ratio.

    Args:
        spec: Just built; changed in place.

    Raises:
        UsageError: The text is no amount.
    """
    if all(getattr(spec, name) is None for name in AMOUNTS):
        object.__setattr__(spec, "ratio", DEFAULT_RATIO)
    settle_amount(spec, "target_params", parse_params)
    settle_amount(spec, "fit_memory", parse_bytes)


def read_plan(file: Path) -> Any:
    """Parse a plan file, YAML or JSON; what it says is checked by ``RatioPlan``.

    Raises:
        UsageError: Not readable, or not YAML.
    """
    import yaml

    try:
        return _text_keys(yaml.safe_load(file.read_text("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--plan {file}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f", line {line + 1}" if line is not None else ""
        raise UsageError(f"--plan {file}{place}: not valid YAML") from error


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
        ratio: The ratio that gave them; None with a plan file.
        remove_params: At least how many parameters go.
        scope: ``layer`` or ``global``.
        fit_bytes: Memory of the card to train on; None without such a budget.
        over_budget: By how much a model of given widths exceeds the budget, in parameters or
            bytes; 0 or less where it fits, and always 0 without a budget.
    """

    after: "tuple[LayerGeometry, ...]"
    ratio: float | None
    remove_params: int
    scope: str
    fit_bytes: int | None
    over_budget: Callable[["tuple[LayerGeometry, ...]"], int]

    def to_mapping(self, after: "tuple[LayerGeometry, ...]") -> dict[str, Any]:
        """Plain form for the manifest, with the least card where that is the budget.

        Args:
            after: Widths of every layer after pruning.
        """
        card_bytes = None
        if self.fit_bytes is not None:
            card_bytes = self.fit_bytes + self.over_budget(after)
        return {
            "ratio": self.ratio,
            "scope": self.scope,
            "remove_params": self.remove_params,
            "card_bytes": card_bytes,
        }


def choose_widths(spec: "PruneSpec", family: "Family", config: dict[str, Any]) -> ChosenWidths:
    """Widths of every layer after pruning.

    Args:
        spec: How to prune.
        family: The base's family.
        config: The base's ``config.json``.

    Raises:
        UsageError: What is asked for does not fit the model, or cannot be reached.
    """
    from loram_cli.memory.account import count_params
    from loram_cli.pruning.plan import layer_widths, pruned_config
    from loram_cli.pruning.ratios import RatioPlan
    from loram_cli.stages.prune.budgets import budget_excess, ratio_of_budget

    geometry = family.geometry(config)
    keeps = (spec.keep_first, spec.keep_last)
    over_budget = budget_excess(spec, family, config)
    ratio = spec.ratio
    if spec.plan is not None:
        ratio = None
        plan = RatioPlan.from_mapping(read_plan(spec.plan), f"plan {spec.plan.name}")
        after = plan.widths(geometry, *keeps, spec.multiple_of)
        if after == geometry.layers:
            raise UsageError(f"plan {spec.plan.name}: drops nothing from this model")
    else:
        if over_budget is not None:
            ratio = ratio_of_budget(spec, geometry, over_budget)
        after = layer_widths(geometry, ratio, *keeps, spec.multiple_of)
        if after == geometry.layers and spec.multiple_of > 1:
            raise UsageError(
                f"--multiple-of {spec.multiple_of} keeps everything at this ratio",
                "pass a smaller one, or a higher --ratio",
            )
    base, pruned = (
        count_params(family, c).total for c in (config, pruned_config(config, geometry, after))
    )
    remove_params = base - pruned
    if spec.target_params is not None:
        remove_params = base - spec.target_params
    return ChosenWidths(
        after, ratio, remove_params, spec.scope, spec.fit_memory, over_budget or (lambda _: 0)
    )


def layers_to_prune(spec: "PruneSpec", planned: "PrunePlan") -> range:
    """From the first to the last layer that may lose something.

    Args:
        spec: How to prune.
        planned: The base and its widths.
    """
    from loram_cli.pruning.plan import pruned_layers

    if spec.plan is not None:
        changed = planned.pruned_layers
        return range(changed[0], changed[-1] + 1)
    return pruned_layers(len(planned.before.layers), spec.keep_first, spec.keep_last)


def plan_input(spec: "PruneSpec") -> dict[str, dict[str, str]]:
    """The manifest's record of the plan file: the same ratios are the same input, wherever it lies.

    Args:
        spec: How to prune.
    """
    if spec.plan is None:
        return {}
    return {"plan": {"path": str(spec.plan), "ratios": digest_of(read_plan(spec.plan))}}


def rank_globally(
    planned: "PrunePlan", scores: "dict[int, LayerScores]", multiple_of: int
) -> "dict[int, LayerKeep]":
    """Choose among the groups of all layers together, until the budget is met.

    Args:
        planned: The base, and how much must go.
        scores: Group scores of every layer that is pruned.
        multiple_of: Of which the channels that stay are to be a multiple.

    Raises:
        LoramError: One head and one channel in each layer are too much still.
    """
    from loram_cli.pruning.groups import params_per_group
    from loram_cli.pruning.select import keep_global

    before = planned.before.layers
    freed = {i: params_per_group(planned.family, planned.config, before[i]) for i in scores}
    remove_params = planned.chosen.remove_params
    while True:
        keep = keep_global(scores, freed, remove_params, multiple_of)
        after = tuple(
            keep[i].widths(layer) if i in keep else layer for i, layer in enumerate(before)
        )
        over = planned.chosen.over_budget(after)
        if over <= 0:
            return keep
        if _is_least(keep, multiple_of):
            raise LoramError(
                "the budget cannot be met by ranking all layers together", "pass --scope layer"
            )
        # In bytes or in parameters: a parameter less is two bytes less in bf16.
        remove_params += max(1, over // 2)


def _is_least(keep: "dict[int, LayerKeep]", multiple_of: int) -> bool:
    return all(
        len(k.key_value_heads) == 1 and len(k.intermediate) <= multiple_of for k in keep.values()
    )
