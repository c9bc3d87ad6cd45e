"""What an objective of training says of itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loram_cli.arch.spec import Family
from loram_cli.errors import UsageError
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import TrainingMemory
from loram_cli.reporting import Reporter
from loram_cli.stages.train.settings import TrainSettings

if TYPE_CHECKING:
    from loram_cli.training.data.tokens import TokenRow
    from loram_cli.training.loop.options import FitResult

# Settings that only some objectives have.
OWN_SETTINGS = ("beta", "generations", "max_completion_length", "temperature")


Load = Callable[..., Sequence[Any]]
"""Reads a data source, all of it or with a ``limit``."""


@dataclass(frozen=True)
class Prepared:
    """Data that was read and made into tokens, ready to train on.

    Attributes:
        examples: How many train.
        eval_examples: How many are held out.
        fit: Trains a PEFT model, keeping checkpoints in a directory; where the objective can,
            layer by layer, by the pass given as ``streamed``.
        lengths: Tokens of each sequence that trains, where forward passes are made of them.
        eval_rows: The examples that are held out, where they are such rows.
    """

    examples: int
    eval_examples: int
    fit: "Callable[..., FitResult]"
    lengths: tuple[int, ...] = ()
    eval_rows: "tuple[TokenRow, ...]" = ()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training learns from, and how.

    Attributes:
        title: Headline of the loss curve.
        learns_from: Its data, in words.
        settings: Values of settings where they are not given, from the spec; one of
            :data:`OWN_SETTINGS` that is absent here is refused.
        load: Reads the data; called with the spec, a tokenizer and a reporter.
        prepare: Makes tokens; called with the spec, training and held-out examples, tokenizer and
            reporter.
        check: Refuses settings that do not go together.
        defaults: Of settings that commands and recipes leave open, where they differ from the
            spec's own; from what they give.
        more_bytes: Memory that it takes beside a training by gradient steps.
        follows_sft: Whether it resumes from the supervised adapter where the run has one.
        sequences_per_example: In one forward pass.
        warm_up: Imports libraries, so that their memory is not charged to training.
    """

    title: str
    learns_from: str
    settings: Callable[[TrainSettings], Mapping[str, Any]]
    load: Callable[[TrainSettings, Any, Reporter], Load]
    prepare: Callable[[TrainSettings, list[Any], list[Any], Any, Reporter], Prepared]
    check: Callable[[TrainSettings], None] = lambda spec: None
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: {}
    more_bytes: Callable[
        [TrainSettings, TrainingMemory, Family, Mapping[str, Any], TrainingSetup], int
    ] = lambda *_: 0
    follows_sft: bool = False
    sequences_per_example: int = 1
    warm_up: Callable[[], None] = lambda: None


def check_policy(spec: TrainSettings) -> None:
    """What preferences and rewards refuse alike.

    Raises:
        UsageError: Dropout, or loss on other tokens than the last answer's.
    """
    if spec.dropout:
        raise UsageError(
            f"--dropout does not go with --objective {spec.objective}",
            "policy and reference must differ only by what is learnt",
        )
    for flag, value, usual in (
        ("--loss-on", spec.loss_on, "answer"),
        ("--train-on", spec.train_on, "all"),
    ):
        if value != usual:
            raise UsageError(f"{flag} {value} does not go with --objective {spec.objective}")


def check_pairs(spec: TrainSettings, hint: str | None = None) -> None:
    """What losses on pairs and on judged answers refuse alike.

    Raises:
        UsageError: As :func:`check_policy`, or a weight of nothing.
    """
    check_policy(spec)
    if spec.beta == 0:
        raise UsageError(f"--beta must be above 0, not {spec.beta:g}", hint)


def loader(load: Load, spec: TrainSettings, reporter: Reporter, **more: Any) -> Load:
    """A function that reads data as the spec says."""
    return partial(load, reporter=reporter, seed=spec.seed, exhausted=spec.exhausted, **more)


def policy_objective(**fields: Any) -> Objective:
    """An objective of TRL's that follows supervised tuning; ``fields`` are those of the class."""
    common = {"more_bytes": reference_bytes, "follows_sft": True, "warm_up": import_trl}
    return Objective(**{**common, **fields})


def reference_bytes(spec: TrainSettings, memory: TrainingMemory, *_: Any) -> int:
    """A reference costs a frozen copy of the factors, since the model is shared."""
    return memory.adapter if spec.from_adapter is not None and spec.beta else 0


def import_trl() -> None:
    """Load TRL's trainers."""
    import loram_cli.training.trl_trainers  # noqa: F401
