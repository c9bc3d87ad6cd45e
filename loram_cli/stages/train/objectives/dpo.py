"""Objective ``dpo``: learns to prefer one answer to another (arXiv 2305.18290)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.reporting import Reporter
from loram_cli.stages.train.objectives.objective import (
    Load,
    Prepared,
    check_pairs,
    loader,
    policy_objective,
)
from loram_cli.stages.train.settings import POLICY_RATE, TrainSettings

if TYPE_CHECKING:
    from loram_cli.training.loop.options import FitResult, PairLoss


def _settings(spec: TrainSettings) -> Mapping[str, Any]:
    # TRL's own, but for dropout, without which policy and reference differ only by training.
    return {"dropout": 0.0, "beta": 0.1, "learning_rate": POLICY_RATE}


def _load(spec: TrainSettings, tokenizer: Any, reporter: Reporter) -> Load:
    from loram_cli.training.data.preferences import load_preferences

    return loader(load_preferences, spec, reporter, tokenizer=tokenizer)


def prepare_pairs(
    spec: TrainSettings,
    train: list[Any],
    evaluation: list[Any],
    tokenizer: Any,
    reporter: Reporter,
    *,
    loss: "PairLoss" = "dpo",
) -> Prepared:
    """Tokens of preferences, to be learnt by one of the losses on pairs."""
    from loram_cli.stages.train.options import train_options
    from loram_cli.training.data.preferences import tokenize_pairs
    from loram_cli.training.loop.options import PreferenceOptions
    from loram_cli.training.trl_jobs import fit_preferences

    train_rows, eval_rows = (
        tokenize_pairs(pairs, tokenizer, spec.max_length, reporter) if pairs else []
        for pairs in (train, evaluation)
    )
    how = PreferenceOptions(beta=spec.beta or 0.0, keeps_reference=spec.from_adapter is not None)

    def fit(model: Any, path: Path) -> "FitResult":
        options = train_options(spec, len(train_rows))
        return fit_preferences(
            model, tokenizer, train_rows, eval_rows, how, options, path, reporter, loss=loss
        )

    lengths = tuple(
        len(row.prompt_ids) + len(answer)
        for row in train_rows
        for answer in (row.chosen_ids, row.rejected_ids)
    )
    return Prepared(len(train_rows), len(eval_rows), fit, lengths)


OBJECTIVE = policy_objective(
    title="Preference training (DPO)",
    learns_from="preferences",
    settings=_settings,
    check=check_pairs,
    load=_load,
    prepare=prepare_pairs,
    # A pair is two sequences in one pass.
    sequences_per_example=2,
)
