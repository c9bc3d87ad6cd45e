"""Objectives beyond supervised tuning: preferences (DPO) and verifiable rewards (GRPO)."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loram_cli.checkpoint.tokenizer_files import encoding
from loram_cli.reporting import Reporter
from loram_cli.training.data.judged import JudgedRow
from loram_cli.training.data.preferences import PairRow
from loram_cli.training.data.questions import Question
from loram_cli.training.loop.job import Job, TrainerParts, highest
from loram_cli.training.loop.loop import fit_job
from loram_cli.training.loop.options import (
    FitOptions,
    FitResult,
    JudgedOptions,
    PairLoss,
    PreferenceOptions,
    RewardOptions,
)
from loram_cli.training.rewards import FIELDS, Reward, with_fields

# Of a completion and the data set's answer: is it right?
Grader = Callable[[str, str], bool]


def fit_preferences(
    model: Any,
    tokenizer: Any,
    train: Sequence[PairRow],
    evaluation: Sequence[PairRow],
    how: PreferenceOptions,
    options: FitOptions,
    work_dir: Path,
    reporter: Reporter,
    *,
    loss: PairLoss = "dpo",
) -> FitResult:
    """Train the factors of a PEFT model to prefer chosen answers to rejected ones.

    Raises:
        LoramError: As :func:`.loop.fit_job`.
        KeyboardInterrupt: As :func:`.loop.fit_job`.
    """
    data = hashlib.sha256(_plain(how) + (b"" if loss == "dpo" else loss.encode()))
    every: list[np.ndarray] = []
    longest = 0
    for rows in (train, evaluation):
        data.update(f"{len(rows)};".encode())
        for row in rows:
            parts = (row.prompt_ids, row.chosen_ids, row.rejected_ids)
            data.update(f"{','.join(str(len(ids)) for ids in parts)};".encode())
            for ids in parts:
                data.update(ids.tobytes())
            every += [ids for ids in parts if len(ids)]
            longest = max(longest, len(parts[0]) + max(len(parts[1]), len(parts[2])))

    def build(parts: TrainerParts) -> Any:
        from loram_cli.training.trl_trainers import preference_trainer

        train_data, eval_data = _pair_dataset(train), _pair_dataset(evaluation)
        return preference_trainer(parts, tokenizer, train_data, eval_data, how, loss)

    job = Job(
        label=loss,
        digest=data.hexdigest(),
        evaluates=bool(evaluation),
        highest_token=highest(every),
        longest=longest,
        build=build,
    )
    return _fit(model, job, options, work_dir, reporter)


def fit_judged(
    model: Any,
    tokenizer: Any,
    train: Sequence[JudgedRow],
    evaluation: Sequence[JudgedRow],
    how: JudgedOptions,
    options: FitOptions,
    work_dir: Path,
    reporter: Reporter,
) -> FitResult:
    """Train the factors of a PEFT model towards good answers and away from bad ones.

    Raises:
        LoramError: As :func:`.loop.fit_job`.
        KeyboardInterrupt: As :func:`.loop.fit_job`.
    """
    data = hashlib.sha256(_plain(how))
    every: list[np.ndarray] = []
    for rows in (train, evaluation):
        data.update(f"{len(rows)};".encode())
        for row in rows:
            data.update(f"{len(row.prompt_ids)},{len(row.completion_ids)},{row.good};".encode())
            every.append(np.concatenate([row.prompt_ids, row.completion_ids]))
            data.update(every[-1].tobytes())

    def build(parts: TrainerParts) -> Any:
        from loram_cli.training.trl_trainers import judged_trainer

        train_data, eval_data = _judged_dataset(train), _judged_dataset(evaluation)
        return judged_trainer(parts, tokenizer, train_data, eval_data, how)

    job = Job(
        label="kto",
        digest=data.hexdigest(),
        evaluates=bool(evaluation),
        highest_token=highest(every),
        longest=max(map(len, every)),
        build=build,
    )
    return _fit(model, job, options, work_dir, reporter)


def fit_rewards(
    model: Any,
    tokenizer: Any,
    train: Sequence[Question],
    evaluation: Sequence[Question],
    grader: Grader,
    how: RewardOptions,
    options: FitOptions,
    work_dir: Path,
    reporter: Reporter,
    *,
    rewards: Sequence[Reward | None] = (None,),
) -> FitResult:
    """Train the factors of a PEFT model towards completions that earn a reward.

    A completion that the grader calls right is rewarded with 1, any other with 0. In the place of
    a None in ``rewards`` that is one reward; the others are functions of the user's own, and what
    counts is their sum, weighted by ``how.reward_weights``.

    Raises:
        LoramError: As :func:`.loop.fit_job`.
        KeyboardInterrupt: As :func:`.loop.fit_job`.
    """
    texts = [[_plain_question(question) for question in part] for part in (train, evaluation)]
    digest = hashlib.sha256(_plain(how) + json.dumps(texts).encode()).hexdigest()
    prompts = [question.prompt for question in (*train, *evaluation)]
    with encoding(tokenizer):
        ids = [np.array(row) for row in tokenizer(prompts)["input_ids"]]

    def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [float(grader(completion, right)) for completion, right in pairs]

    def build(parts: TrainerParts) -> Any:
        from loram_cli.training.trl_trainers import reward_trainer

        train_data, eval_data = _question_dataset(train), _question_dataset(evaluation)
        functions = [with_fields(reward) if reward else exact_match for reward in rewards]
        return reward_trainer(parts, tokenizer, train_data, eval_data, how, functions)

    job = Job(
        label="grpo",
        digest=digest,
        evaluates=bool(evaluation),
        highest_token=highest(ids),
        longest=max(map(len, ids)) + how.max_completion_length,
        build=build,
    )
    return _fit(model, job, options, work_dir, reporter)


def _fit(
    model: Any, job: Job, options: FitOptions, work_dir: Path, reporter: Reporter
) -> FitResult:
    from loram_cli.training.trl_trainers import drop_reference

    try:
        return fit_job(model, job, options, work_dir, reporter)
    finally:
        drop_reference(model)


def _pair_dataset(rows: Sequence[PairRow]) -> Any:
    import datasets

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = {name: [getattr(row, name).tolist() for row in rows] for name in names}
    return datasets.Dataset.from_dict(columns) if rows else None


def _judged_dataset(rows: Sequence[JudgedRow]) -> Any:
    import datasets

    columns: dict[str, list[Any]] = {
        name: [getattr(row, name).tolist() for row in rows]
        for name in ("prompt_ids", "completion_ids")
    }
    columns["label"] = [row.good for row in rows]
    return datasets.Dataset.from_dict(columns) if rows else None


def _question_dataset(questions: Sequence[Question]) -> Any:
    import datasets

    rows = [_plain_question(question) for question in questions]
    return datasets.Dataset.from_list(rows) if questions else None


def _plain_question(question: Question) -> dict[str, Any]:
    """A row of TRL's; the fields are one text, since they may change their type between records."""
    own = {"prompt": question.prompt, "answer": question.answer}
    return {**own, FIELDS: json.dumps(dict(question.fields))} if question.fields else own


def _plain(how: PreferenceOptions | RewardOptions) -> bytes:
    plain = {k: v for k, v in asdict(how).items() if v is not None}
    return json.dumps(plain, sort_keys=True).encode()
