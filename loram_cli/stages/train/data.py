"""Training data read, split and made into tokens, as the objective says."""

from typing import Any

from loram_cli.reporting import Reporter
from loram_cli.stages.train.objectives.objective import Prepared
from loram_cli.stages.train.spec import TrainSpec
from loram_cli.training.data.documents import split_eval
from loram_cli.training.data.markers import foreign_markers


def prepare(spec: TrainSpec, tokenizer: Any, reporter: Reporter) -> Prepared:
    """Read the data of the objective.

    Raises:
        LoramError: It cannot be read, or nothing of it can be trained on.
    """
    objective = spec.chosen_objective
    load = objective.load(spec, tokenizer, reporter)
    examples = list(load(spec.data))
    markers = foreign_markers((text for item in examples for text in _texts(item)), tokenizer)
    if markers:
        reporter.warn(
            f"{spec.data}: {', '.join(markers)} are not tokens of this model: "
            "is the text in another model's chat format?"
        )
    if spec.eval_data is not None:
        evaluation = list(load(spec.eval_data))[: spec.eval_examples]
        return objective.prepare(spec, examples, evaluation, tokenizer, reporter)
    train, evaluation = split_eval(
        examples, min(spec.eval_examples, len(examples) // 10), spec.seed
    )
    return objective.prepare(spec, train, evaluation, tokenizer, reporter)


def _texts(item: Any) -> tuple[str, ...]:
    if hasattr(item, "completion"):
        return item.prompt, item.completion
    if hasattr(item, "chosen"):
        return item.chosen.prompt, item.chosen.completion, item.rejected.completion
    return (item.prompt,)
