"""Training data read, split and made into tokens, as the objective says."""

from typing import Any

from loram_cli.modeling.load import load_tokenizer
from loram_cli.reporting import Reporter
from loram_cli.stages.core.plan import TRIED_RECORDS, reads_quickly
from loram_cli.stages.fit.run import held_out
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
    if spec.eval_data is None:
        count = held_out(spec.eval_examples, len(examples), "--eval-examples", reporter)
        train, evaluation = split_eval(examples, count, spec.seed)
        return objective.prepare(spec, train, evaluation, tokenizer, reporter)
    evaluation = list(load(spec.eval_data))
    if len(evaluation) > spec.eval_examples:
        reporter.note(
            f"{spec.eval_data}: the first {spec.eval_examples} of {len(evaluation)} examples "
            "are held out (--eval-examples)"
        )
    evaluation = evaluation[: spec.eval_examples]
    return objective.prepare(spec, examples, evaluation, tokenizer, reporter)


def tried(spec: TrainSpec, reporter: Reporter) -> Prepared | None:
    """The data as it would train; None where it takes long to read.

    Such data is tried on its first records.

    Raises:
        LoramError: As :func:`prepare`.
    """
    sources = [spec.data, *filter(None, [spec.eval_data])]
    if not all(map(reads_quickly, sources)):
        load = spec.chosen_objective.load(spec, None, reporter)
        for source in sources:
            load(source, limit=TRIED_RECORDS)
        return None
    return prepare(spec, load_tokenizer(spec.source), reporter)


def counted(spec: TrainSpec, prepared: Prepared) -> dict[str, int | float]:
    """Examples that train and are held out, how often each is seen, and their tokens."""
    # A batch counts completions where several are drawn for an example.
    drawn = spec.generations or 1
    steps = spec.steps_for(prepared.examples * drawn)
    figures: dict[str, int | float] = {
        "examples": prepared.examples,
        "eval_examples": prepared.eval_examples,
        "steps": steps,
        "epochs": round(steps * spec.batch / (prepared.examples * drawn), 2),
    }
    if prepared.lengths:
        figures["tokens_per_epoch"] = sum(prepared.lengths)
    return figures


def _texts(item: Any) -> tuple[str, ...]:
    if hasattr(item, "completion"):
        return item.prompt, item.completion
    if hasattr(item, "chosen"):
        return item.chosen.prompt, item.chosen.completion, item.rejected.completion
    return (item.prompt,)
