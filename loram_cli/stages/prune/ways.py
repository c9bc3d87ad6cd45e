"""``--fit-memory`` alone: the way that kept most of full LoRA's gain, of those that fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from loram_cli.arch.registry import family_for
from loram_cli.errors import UsageError
from loram_cli.memory.setup import TrainingSetup
from loram_cli.pruning.budget import card_bytes
from loram_cli.pruning.frontier import Point, best_fitting, measured
from loram_cli.pruning.strategies import DEFAULT
from loram_cli.stages.prune.budgets import training_setup
from loram_cli.stages.prune.spec import TRAINING, PruneSpec
from loram_cli.units import format_bytes

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ChosenWay:
    """What ``--fit-memory`` came to.

    Attributes:
        spec: The pruning that it stands for.
        card_bytes: Memory of the smallest card to train on; None where widths are yet to be chosen.
        said: What was chosen, and why, in two lines.
    """

    spec: PruneSpec
    card_bytes: int | None
    said: tuple[str, str]


def choose_way(
    spec: PruneSpec, config: Config, small: Callable[[PruneSpec], Config]
) -> ChosenWay | None:
    """The pruning that a memory stands for.

    Args:
        spec: What was asked for, settled.
        config: The base's.
        small: The small model's config by a pruning.

    Returns:
        None where the spec says itself how to prune.

    Raises:
        UsageError: The best way that fits is to train on the base.
    """
    memory_bytes = spec.fit_memory
    if not spec.picks_way or memory_bytes is None:
        return None
    base, points = measured()
    asked = f"--fit-memory {format_bytes(memory_bytes)}"
    if spec.quantize is not None:
        points = tuple(point for point in points if point.quantize == spec.quantize)
    setups = {
        point.name: found
        for point in points
        if (found := _fitting_setup(spec, config, small, point, memory_bytes)) is not None
    }
    tried = [point for point in points if point.name in setups]
    chosen = best_fitting(tried, lambda point: setups[point.name][1], memory_bytes)
    if chosen is None:
        return _narrowest(spec, asked)
    point, missed = chosen.point, chosen.missed
    train = f"train{_training_flags(setups[point.name][0])}"
    held = format_bytes(chosen.needed)
    if not point.prune:
        on_full = train.replace("train", "loram train --on full", 1)
        raise UsageError(
            f"{asked}: the whole base fits already, and needs a card of {held}",
            f"train on it as it is, '{on_full}', or pass --strategy and --ratio",
        )
    then = f"align --method {point.align}, {train}" if point.align else train
    then += ", recover --fit-scale" if point.fit_scale else ""
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in point.prune.items())
    why = f"why: it kept {point.kept:.2f} of full LoRA's gain on {base}, the most of what fits"
    if missed is not None:
        needed = format_bytes(chosen.missed_needed or 0)
        name = missed.name if missed.prune else "the whole base"
        why += f"; {name} kept {missed.kept:.2f}, and needs {needed}"
    said = f"{asked}: {' '.join(flags)}, then {then}; a card of {held}"
    return ChosenWay(_told(spec, point), chosen.needed, (said, why))


def _narrowest(spec: PruneSpec, asked: str) -> ChosenWay:
    """As few heads and channels less as fit, in the training that takes least."""
    lean: dict[str, Any] = {
        "quantize": "nf4", "gradient_checkpointing": True, "micro_batch": 1,
    }  # fmt: skip
    named = replace(spec, strategy=DEFAULT, **lean)
    flags = _training_flags(training_setup(named, {}))
    said = f"{asked}: --strategy {DEFAULT} at the smallest ratio that fits, then train{flags}"
    return ChosenWay(named, None, (said, "why: none of the ways that were measured fits"))


def _fitting_setup(
    spec: PruneSpec,
    config: Config,
    small: Callable[[PruneSpec], Config],
    point: Point,
    memory_bytes: int,
) -> tuple[TrainingSetup, int] | None:
    """The first setup in which a point's training fits, else the last; and the card it needs.

    Returns:
        None where the base cannot be made so.
    """
    try:
        trained = small(_told(spec, point)) if point.prune else config
    except UsageError:
        return None
    family = family_for(config, str(spec.model))
    setup = replace(training_setup(spec, config), quantize=point.quantize)
    checkpointing = replace(setup, gradient_checkpointing=True)
    leanest = replace(checkpointing, micro_batch=1)
    for tried in (setup, checkpointing, leanest):
        needed = card_bytes(family, trained, tried)
        if needed <= memory_bytes:
            return tried, needed
    return leanest, needed


def _told(spec: PruneSpec, point: Point) -> PruneSpec:
    """The pruning of a point, without the memory that it was chosen by."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(spec)}
    forgotten = {name: defaults[name] for name in ("fit_memory", *TRAINING)}
    told: PruneSpec = replace(spec, **(forgotten | point.prune)).settled()
    return told


def _training_flags(setup: TrainingSetup) -> str:
    """The flags of ``train`` that a setup needs beside the defaults, each after a space."""
    flags = [f"--quantize {setup.quantize}"] if setup.quantize else []
    flags += ["--gradient-checkpointing"] if setup.gradient_checkpointing else []
    defaults = TrainingSetup()
    for name, field in (("rank", "rank"), ("micro-batch", "micro_batch"), ("max-length", "length")):
        if getattr(setup, field) != getattr(defaults, field):
            flags.append(f"--{name} {getattr(setup, field)}")
    return "".join(f" {flag}" for flag in flags)
