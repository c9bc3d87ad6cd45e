"""Objective ``grpo``: draws answers and learns from those that are right (arXiv 2402.03300)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.arch.spec import Family
from loram_cli.checkpoint.tokenizer_files import encoding
from loram_cli.errors import UsageError
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import TrainingMemory, generation_bytes
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import process_count
from loram_cli.stages.train.objectives.objective import (
    Load,
    Prepared,
    check_policy,
    loader,
    policy_objective,
    reference_bytes,
)
from loram_cli.stages.train.settings import POLICY_RATE, TrainSettings
from loram_cli.training.rewards import check_reward, load_reward, parse_reward

if TYPE_CHECKING:
    from loram_cli.training.loop.options import FitResult

_LONGEST_COMPLETION = 256
_GENERATIONS = 8
# Of a step: with fewer, many a step has no question that some completions solve and others do not.
_QUESTIONS = 8


def _settings(spec: TrainSettings) -> Mapping[str, Any]:
    # TRL's own, but for dropout, without which policy and reference differ only by training.
    return {
        "dropout": 0.0,
        "learning_rate": POLICY_RATE,
        "beta": 0.0,
        "generations": _GENERATIONS,
        "temperature": 1.0,
        "max_completion_length": min(_LONGEST_COMPLETION, max(1, spec.max_length // 2)),
    }


def _defaults(values: Mapping[str, Any]) -> Mapping[str, Any]:
    generations = values.get("generations")
    return {"batch": _QUESTIONS * (generations if isinstance(generations, int) else _GENERATIONS)}


def _check(spec: TrainSettings) -> None:
    check_policy(spec)
    assert spec.generations is not None and spec.max_completion_length is not None
    if spec.batch % spec.generations:
        raise UsageError(
            f"--batch {spec.batch} is no multiple of --generations {spec.generations}",
            "a batch counts completions, and holds whole questions",
        )
    if spec.max_completion_length >= spec.max_length:
        raise UsageError(
            f"--max-completion-length {spec.max_completion_length} leaves no room for a prompt in "
            f"--max-length {spec.max_length}"
        )
    rewards = [parse_reward(text) for text in spec.reward]
    if any(reward.file for reward in rewards) and not spec.allow_code_execution:
        raise UsageError(
            f"--reward {spec.reward[0]} runs a Python file with all of your rights",
            "read it, and pass --allow-code-execution",
        )
    if len({reward.label for reward in rewards}) < len(rewards):
        raise UsageError("two --reward have the same name", "give each function its own")
    if spec.reward_weights and len(spec.reward_weights) != max(1, len(rewards)):
        raise UsageError(
            f"{len(spec.reward_weights)} --reward-weights for {max(1, len(rewards))} rewards",
            "give one weight for each --reward, in their order",
        )


def _load(spec: TrainSettings, tokenizer: Any, reporter: Reporter) -> Load:
    from loram_cli.training.data.questions import load_questions

    rewards = [parse_reward(text) for text in spec.reward]
    for reward in rewards:
        check_reward(reward)
    return loader(
        load_questions,
        spec,
        reporter,
        tokenizer=tokenizer,
        numbers=not rewards or any(reward.file is None for reward in rewards),
        own_rewards=any(reward.file is not None for reward in rewards),
    )


def _prepare(
    spec: TrainSettings,
    train: list[Any],
    evaluation: list[Any],
    tokenizer: Any,
    reporter: Reporter,
) -> Prepared:
    from loram_cli.evaluation.grading import strict_grader
    from loram_cli.stages.train.options import train_options
    from loram_cli.training.data.questions import fitting_questions
    from loram_cli.training.loop.options import RewardOptions
    from loram_cli.training.trl_jobs import fit_rewards

    assert spec.generations and spec.max_completion_length and spec.temperature
    room = spec.max_length - spec.max_completion_length

    def fitting(questions: list[Any]) -> list[Any]:
        if not questions:
            return []
        with encoding(tokenizer):
            ids = tokenizer([question.prompt for question in questions])["input_ids"]
        return fitting_questions(questions, [len(row) for row in ids], room, reporter)

    train, evaluation = fitting(train), fitting(evaluation)
    at_once = spec.batch // spec.generations
    if len(train) < at_once:
        raise UsageError(
            f"{spec.data}: {len(train)} questions, and a step takes {at_once} "
            f"(--batch {spec.batch} / --generations {spec.generations})",
            "lower --batch, or pass more data",
        )
    how = RewardOptions(
        beta=spec.beta or 0.0,
        keeps_reference=spec.from_adapter is not None,
        generations=spec.generations,
        max_completion_length=spec.max_completion_length,
        temperature=spec.temperature,
        reward_weights=spec.reward_weights or None,
    )
    grader = strict_grader()
    names = [parse_reward(text) for text in spec.reward]
    # The files run here, once everything else is known to be in order.
    rewards = [load_reward(name) if name.file else None for name in names] or [None]

    def fit(model: Any, path: Path) -> "FitResult":
        options = train_options(spec, len(train) * how.generations)
        return fit_rewards(
            model,
            tokenizer,
            train,
            evaluation,
            grader,
            how,
            options,
            path,
            reporter,
            rewards=rewards,
        )

    return Prepared(len(train), len(evaluation), fit)


def _more_bytes(
    spec: TrainSettings,
    memory: TrainingMemory,
    family: Family,
    config: Mapping[str, Any],
    setup: TrainingSetup,
) -> int:
    """Completions are drawn while no activations are held: only the larger of the two counts."""
    drawn = generation_bytes(family, config, setup, spec.batch // process_count())
    passing = memory.activations + memory.logits
    return reference_bytes(spec, memory) + max(0, drawn - passing)


OBJECTIVE = policy_objective(
    title="Training on verifiable rewards (GRPO)",
    learns_from="word problems",
    settings=_settings,
    check=_check,
    defaults=_defaults,
    load=_load,
    prepare=_prepare,
    more_bytes=_more_bytes,
)
