"""The objectives of ``train``: what each one may be told, its data, and its fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import process_count

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family
    from loram_cli.memory.setup import TrainingSetup
    from loram_cli.memory.training import TrainingMemory
    from loram_cli.stages.train.stage import TrainSpec
    from loram_cli.training.loop.options import FitResult

# Settings that only some objectives have, with their values where they are not given: TRL's own,
# but for dropout, without which policy and reference differ by training alone.
_OWN: dict[str, dict[str, Any]] = {
    "sft": {"dropout": 0.05},
    "dpo": {"dropout": 0.0, "beta": 0.1},
    "grpo": {"dropout": 0.0, "beta": 0.0, "generations": 8, "temperature": 1.0},
}
# Those that go on from supervised tuning, in the order in which a run would have them.
BEYOND_SFT = tuple(name for name in _OWN if name != "sft")
_SPECIAL = ("beta", "generations", "temperature", "max_completion_length")
_LONGEST_COMPLETION = 256


def own_settings(spec: "TrainSpec") -> dict[str, Any]:
    """The spec's settings that depend on the objective, each with its value.

    Raises:
        UsageError: A setting that the objective does not have, or one out of range.
    """
    known = dict(_OWN[spec.objective])
    if spec.objective == "grpo":
        known["max_completion_length"] = min(_LONGEST_COMPLETION, max(1, spec.max_length // 2))
    for name in _SPECIAL:
        if getattr(spec, name) is not None and name not in known:
            having = [key for key in _OWN if name in _OWN[key]] or ["grpo"]
            raise UsageError(
                f"--{name.replace('_', '-')} does not go with --objective {spec.objective}",
                f"it is for {' and '.join(having)}",
            )
    values = {k: v if getattr(spec, k) is None else getattr(spec, k) for k, v in known.items()}
    _check(spec, values)
    return values


def _check(spec: "TrainSpec", values: dict[str, Any]) -> None:
    if not 0 <= values["dropout"] < 1:
        raise UsageError(f"--dropout {values['dropout']} is outside [0, 1)")
    if spec.objective == "sft":
        return
    if values["dropout"]:
        raise UsageError(
            f"--dropout does not go with --objective {spec.objective}",
            "policy and reference are to differ by what is learnt alone",
        )
    if spec.loss_on != "answer":
        raise UsageError(f"--loss-on {spec.loss_on} does not go with --objective {spec.objective}")
    least = "above 0" if spec.objective == "dpo" else "0 or more"
    if values["beta"] < 0 or (spec.objective == "dpo" and not values["beta"]):
        raise UsageError(f"--beta must be {least}, not {values['beta']}")
    if spec.objective == "dpo":
        return
    if values["generations"] < 2:
        raise UsageError("--generations must be 2 or more: each is compared with the others")
    if spec.batch % values["generations"]:
        raise UsageError(
            f"--batch {spec.batch} is no multiple of --generations {values['generations']}",
            "a batch counts completions, and holds whole questions",
        )
    if not 0 < values["temperature"] < float("inf"):
        raise UsageError("--temperature must be above 0")
    if not 0 < values["max_completion_length"] < spec.max_length:
        raise UsageError(
            f"--max-completion-length {values['max_completion_length']} leaves no room for a "
            f"prompt in --max-length {spec.max_length}"
        )


@dataclass(frozen=True)
class Prepared:
    """Data that was read and made into tokens, ready to train on.

    Attributes:
        examples: How many train.
        fit: Trains a PEFT model, keeping checkpoints in a directory.
    """

    examples: int
    fit: "Callable[[Any, Path], FitResult]"


def loader(spec: "TrainSpec", tokenizer: Any, reporter: Reporter) -> Callable[..., Sequence[Any]]:
    """The function that reads the objective's data."""
    if spec.objective == "grpo":
        from loram_cli.training.data.questions import load_questions

        return load_questions
    if spec.objective == "dpo":
        from loram_cli.training.data.preferences import load_preferences

        return partial(load_preferences, tokenizer=tokenizer, reporter=reporter)
    from loram_cli.training.data.documents import load_instructions

    return partial(load_instructions, tokenizer=tokenizer, reporter=reporter)


def prepare(spec: "TrainSpec", tokenizer: Any, reporter: Reporter) -> Prepared:
    """Read the data of the objective.

    Raises:
        LoramError: It cannot be read, or nothing of it can be trained on.
    """
    preparing = {"sft": _prepare_sft, "dpo": _prepare_dpo, "grpo": _prepare_grpo}
    train, evaluation = _split(spec, loader(spec, tokenizer, reporter), tokenizer, reporter)
    return preparing[spec.objective](spec, train, evaluation, tokenizer, reporter)


def total_bytes(
    spec: "TrainSpec",
    memory: "TrainingMemory",
    family: "Family",
    config: Any,
    setup: "TrainingSetup",
) -> int:
    """Peak memory of the objective, by arithmetic.

    A reference costs a frozen copy of the factors, since the model is shared. Completions are
    drawn while no activations are held, so that only the larger of the two counts.
    """
    from loram_cli.memory.training import generation_bytes

    reference = memory.adapter if spec.from_adapter is not None and spec.beta else 0
    if spec.objective != "grpo":
        return memory.total + reference
    drawn = generation_bytes(family, config, setup, spec.batch // process_count())
    passing = memory.activations + memory.logits
    return memory.total + reference + max(0, drawn - passing)


def _prepare_sft(
    spec: "TrainSpec", train: list[Any], evaluation: list[Any], tokenizer: Any, reporter: Reporter
) -> Prepared:
    from loram_cli.stages.fit.run import fit_options
    from loram_cli.training.data.tokens import tokenize_examples
    from loram_cli.training.loop.loop import fit_lora

    train_rows, eval_rows = (
        tokenize_examples(
            examples, tokenizer, spec.max_length, reporter, loss_on_prompt=spec.loss_on == "all"
        )
        if examples
        else []
        for examples in (train, evaluation)
    )

    def fit(model: Any, path: Path) -> "FitResult":
        return fit_lora(model, train_rows, eval_rows, fit_options(spec), path, reporter)

    return Prepared(len(train_rows), fit)


def _prepare_dpo(
    spec: "TrainSpec", train: list[Any], evaluation: list[Any], tokenizer: Any, reporter: Reporter
) -> Prepared:
    from loram_cli.stages.fit.run import fit_options
    from loram_cli.training.data.preferences import tokenize_pairs
    from loram_cli.training.trl_jobs import PreferenceOptions, fit_preferences

    train_rows, eval_rows = (
        tokenize_pairs(pairs, tokenizer, spec.max_length, reporter) if pairs else []
        for pairs in (train, evaluation)
    )
    how = PreferenceOptions(beta=spec.beta or 0.0, keeps_reference=spec.from_adapter is not None)

    def fit(model: Any, path: Path) -> "FitResult":
        options = fit_options(spec)
        return fit_preferences(
            model, tokenizer, train_rows, eval_rows, how, options, path, reporter
        )

    return Prepared(len(train_rows), fit)


def _prepare_grpo(
    spec: "TrainSpec", train: list[Any], evaluation: list[Any], tokenizer: Any, reporter: Reporter
) -> Prepared:
    from loram_cli.evaluation.grading import strict_grader
    from loram_cli.stages.fit.run import fit_options
    from loram_cli.training.data.questions import fitting_questions
    from loram_cli.training.trl_jobs import RewardOptions, fit_rewards

    completion = int(spec.max_completion_length or 1)

    def fitting(questions: list[Any]) -> list[Any]:
        if not questions:
            return []
        ids = tokenizer([question.prompt for question in questions])["input_ids"]
        room = spec.max_length - completion
        return fitting_questions(questions, [len(row) for row in ids], room, reporter)

    train, evaluation = fitting(train), fitting(evaluation)
    at_once = spec.batch // int(spec.generations or 1)
    if len(train) < at_once:
        raise UsageError(
            f"{spec.data}: {len(train)} questions, and a step takes {at_once} "
            f"(--batch {spec.batch} / --generations {spec.generations})",
            "lower --batch, or pass more data",
        )
    how = RewardOptions(
        beta=spec.beta or 0.0,
        keeps_reference=spec.from_adapter is not None,
        generations=int(spec.generations or 1),
        max_completion_length=completion,
        temperature=spec.temperature or 1.0,
    )
    grader = strict_grader()

    def fit(model: Any, path: Path) -> "FitResult":
        options = fit_options(spec)
        return fit_rewards(
            model, tokenizer, train, evaluation, grader, how, options, path, reporter
        )

    return Prepared(len(train), fit)


def _split(
    spec: "TrainSpec", load: Callable[..., Sequence[Any]], tokenizer: Any, reporter: Reporter
) -> tuple[list[Any], list[Any]]:
    from loram_cli.training.data.documents import split_eval
    from loram_cli.training.data.markers import foreign_markers

    examples = list(load(spec.data))
    markers = foreign_markers((text for item in examples for text in _texts(item)), tokenizer)
    if markers:
        reporter.warn(
            f"{spec.data}: {', '.join(markers)} are not tokens of this model: "
            "is the text in another model's chat format?"
        )
    if spec.eval_data is not None:
        return examples, list(load(spec.eval_data))[: spec.eval_examples]
    return split_eval(examples, min(spec.eval_examples, len(examples) // 10), spec.seed)


def _texts(item: Any) -> tuple[str, ...]:
    if hasattr(item, "completion"):
        return item.prompt, item.completion
    if hasattr(item, "chosen"):
        return item.chosen.prompt, item.chosen.completion, item.rejected.completion
    return (item.prompt,)
