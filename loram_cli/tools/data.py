"""What training would learn from a data set, read by the model's tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loram_cli.modeling.load import load_tokenizer
from loram_cli.reporting import NullReporter
from loram_cli.stages.train.spec import TrainSpec
from loram_cli.tools.data_spec import DataSpec
from loram_cli.training.data.examples import Example
from loram_cli.training.data.preview import Preview, preview, preview_answers
from loram_cli.training.data.template_names import with_template


def run(spec: DataSpec, model: Path) -> Preview:
    """Read, render and tokenize the data as training by the objective does.

    Args:
        spec: Which data, and how.
        model: The directory of the model, for its tokenizer.

    Raises:
        LoramError: The data or the tokenizer cannot be read; names file and line.
    """
    tokenizer = with_template(load_tokenizer(model), spec.chat_template)
    if spec.objective != "sft":
        return _of_objective(spec, model, tokenizer)
    return preview(
        spec.data,
        tokenizer,
        max_length=spec.max_length,
        train_on=spec.train_on,
        loss_on_prompt=spec.loss_on == "all",
        rows=spec.rows,
        limit=spec.limit,
        seed=spec.seed,
        exhausted=spec.exhausted,
    )


class _Collector(NullReporter):
    """Keeps what reading the data warns of."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, line: str) -> None:
        self.lines.append(line)


def _of_objective(spec: DataSpec, model: Path, tokenizer: Any) -> Preview:
    training = TrainSpec(
        source=model,
        out=Path(),
        data=spec.data,
        objective=spec.objective,
        max_length=spec.max_length,
        exhausted=spec.exhausted,
        seed=spec.seed,
        reward=spec.reward,
        # Functions are looked for, and not run.
        allow_code_execution=bool(spec.reward),
    ).settled()
    collector = _Collector()
    load = training.chosen_objective.load(training, tokenizer, collector)
    items = load(spec.data, limit=spec.limit)
    answers = [
        (f"{spec.data}, {number}{name}", example, avoided)
        for number, item in enumerate(items, 1)
        for name, example, avoided in _answers(item)
    ]
    return preview_answers(
        answers, tokenizer, max_length=spec.max_length, rows=spec.rows, told=collector.lines
    )


def _answers(item: Any) -> Iterator[tuple[str, Example, bool]]:
    """The answers that an item of an objective's data holds, each with its name."""
    if hasattr(item, "rejected"):
        yield ", chosen", item.chosen, False
        yield ", rejected", item.rejected, True
    elif hasattr(item, "good"):
        yield ", good" if item.good else ", bad", item.example, not item.good
    else:
        yield "", Example(item.prompt, ""), False
