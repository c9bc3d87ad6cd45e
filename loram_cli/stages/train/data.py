"""Training data read, split and made into tokens, as the objective says."""

import random
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.sources import TEMPLATE_FILE
from loram_cli.modeling.load import load_tokenizer
from loram_cli.reporting import Reporter
from loram_cli.stages.core.plan import TRIED_RECORDS, reads_quickly
from loram_cli.stages.fit.run import held_out
from loram_cli.stages.train.objectives.objective import Prepared
from loram_cli.stages.train.spec import TrainSpec
from loram_cli.training.data.documents import split_eval
from loram_cli.training.data.markers import foreign_markers
from loram_cli.training.data.template_names import (
    with_adapter_template,
    with_template,
)
from loram_cli.training.data.tokens import TokenRow


def training_tokenizer(spec: TrainSpec) -> Any:
    """The model's tokenizer, with the template that is asked for, or that of an earlier adapter.

    Raises:
        LoramError: There is no tokenizer, or no such template.
    """
    tokenizer = load_tokenizer(spec.source)
    if spec.chat_template is not None:
        return with_template(tokenizer, spec.chat_template)
    return with_adapter_template(tokenizer, spec.from_adapter)


def save_template(tokenizer: Any, path: Path) -> None:
    """Leave a template that is not the model's own beside the adapter that was trained by it."""
    if getattr(tokenizer, "chat_template_source", None) is not None:
        (path / TEMPLATE_FILE).write_text(str(tokenizer.chat_template), "utf-8")


def prepare(spec: TrainSpec, tokenizer: Any, reporter: Reporter) -> Prepared:
    """Read the data of the objective.

    Raises:
        LoramError: It cannot be read, or nothing of it can be trained on.
    """
    objective = spec.chosen_objective
    load = objective.load(spec, tokenizer, reporter)
    # A list, or a sequence in a file where it exceeds the memory that data may take.
    examples: Any = load(spec.data)
    markers = foreign_markers((text for item in examples for text in _texts(item)), tokenizer)
    if markers:
        reporter.warn(
            f"{spec.data}: {', '.join(markers)} are not tokens of this model: "
            "is the text in another model's chat format?"
        )
    if spec.eval_data is None:
        count = held_out(spec.eval_examples, len(examples), "--eval-examples", reporter)
        train: Any
        train, evaluation = split_eval(examples, count, spec.seed)
        return objective.prepare(spec, train, evaluation, tokenizer, reporter)
    found = load(spec.eval_data)
    if len(found) > spec.eval_examples:
        reporter.note(
            f"{spec.eval_data}: the first {spec.eval_examples} of {len(found)} examples "
            "are held out (--eval-examples)"
        )
    evaluation = list(found[: spec.eval_examples])
    return objective.prepare(spec, examples, evaluation, tokenizer, reporter)


def training_rows(
    spec: TrainSpec, tokenizer: Any, count: int, reporter: Reporter
) -> list[TokenRow]:
    """Some of the examples that were trained on, as tokens; none of those that were held out.

    Raises:
        LoramError: As :func:`prepare`.
    """
    objective = spec.chosen_objective
    examples: Any = objective.load(spec, tokenizer, reporter)(spec.data)
    held = 0
    if spec.eval_data is None:
        held = held_out(spec.eval_examples, len(examples), "--eval-examples", reporter)
    train, _ = split_eval(examples, held, spec.seed)
    places = random.Random(spec.seed).sample(range(len(train)), min(count, len(train)))
    drawn = [train[place] for place in sorted(places)]
    return list(objective.prepare(spec, [], drawn, tokenizer, reporter).eval_rows)


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
    return prepare(spec, training_tokenizer(spec), reporter)


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
