"""Objective ``kto``: learns from single answers that are good or bad (arXiv 2402.01306)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.stages.train.objectives import dpo
from loram_cli.stages.train.objectives.objective import (
    Load,
    Prepared,
    check_pairs,
    loader,
    policy_objective,
)
from loram_cli.stages.train.settings import TrainSettings

if TYPE_CHECKING:
    from loram_cli.training.loop.options import FitResult


def _settings(spec: TrainSettings) -> Mapping[str, Any]:
    return {**dpo.OBJECTIVE.settings(spec), "beta": 0.1}


def _check(spec: TrainSettings) -> None:
    check_pairs(spec)
    if spec.micro_batch < 2:
        raise UsageError(
            "--objective kto needs a --micro-batch of at least 2",
            "it compares each prompt with another one's answer of the same pass",
        )


def _load(spec: TrainSettings, tokenizer: Any, reporter: Reporter) -> Load:
    from loram_cli.training.data.judged import load_judged

    return loader(load_judged, spec, reporter, tokenizer=tokenizer)


def _prepare(
    spec: TrainSettings,
    train: list[Any],
    evaluation: list[Any],
    tokenizer: Any,
    reporter: Reporter,
) -> Prepared:
    from loram_cli.stages.train.options import train_options
    from loram_cli.training.data.judged import side_weights, tokenize_judged
    from loram_cli.training.loop.options import JudgedOptions
    from loram_cli.training.trl_jobs import fit_judged

    train_rows, eval_rows = (
        tokenize_judged(answers, tokenizer, spec.max_length, reporter) if answers else []
        for answers in (train, evaluation)
    )
    good, bad = side_weights(train_rows)
    if good != bad:
        reporter.note(
            f"good and bad answers weigh the same in all: each good one {good:.2f}, "
            f"each bad one {bad:.2f}"
        )
    how = JudgedOptions(
        beta=spec.beta or 0.0,
        keeps_reference=spec.from_adapter is not None,
        good_weight=good,
        bad_weight=bad,
    )

    def fit(model: Any, path: Path) -> "FitResult":
        options = train_options(spec, len(train_rows))
        return fit_judged(model, tokenizer, train_rows, eval_rows, how, options, path, reporter)

    return Prepared(len(train_rows), len(eval_rows), fit)


OBJECTIVE = policy_objective(
    title="Training on judged answers (KTO)",
    learns_from="answers with a label",
    settings=_settings,
    check=_check,
    load=_load,
    prepare=_prepare,
)
