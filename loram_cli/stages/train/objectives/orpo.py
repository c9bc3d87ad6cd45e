"""Objective ``orpo``: learns chosen answers and to prefer them, at once (arXiv 2403.07691)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loram_cli.reporting import Reporter
from loram_cli.stages.train.objectives import dpo
from loram_cli.stages.train.objectives.objective import Prepared, check_pairs
from loram_cli.stages.train.settings import TrainSettings


def _settings(spec: TrainSettings) -> Mapping[str, Any]:
    # The weight of the odds ratio in the paper, and TRL's default.
    return {**dpo.OBJECTIVE.settings(spec), "beta": 0.1}


def _check(spec: TrainSettings) -> None:
    check_pairs(spec, "without the odds ratio it is supervised tuning: --objective sft")


def _prepare(
    spec: TrainSettings,
    train: list[Any],
    evaluation: list[Any],
    tokenizer: Any,
    reporter: Reporter,
) -> Prepared:
    return dpo.prepare_pairs(spec, train, evaluation, tokenizer, reporter, loss="orpo")


OBJECTIVE = replace(
    dpo.OBJECTIVE,
    title="Preference training (ORPO)",
    settings=_settings,
    check=_check,
    prepare=_prepare,
    # No reference: only the other answer is compared with.
    more_bytes=lambda *_: 0,
)
