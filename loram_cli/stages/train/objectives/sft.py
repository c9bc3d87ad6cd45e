"""Objective ``sft``: learns given answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.reporting import Reporter
from loram_cli.stages.train.objectives.objective import Load, Objective, Prepared, loader
from loram_cli.stages.train.settings import SFT_RATE, TrainSettings

if TYPE_CHECKING:
    from loram_cli.modeling.layerwise.lora_pass import LoraPass
    from loram_cli.training.loop.options import FitResult


def _settings(spec: TrainSettings) -> Mapping[str, Any]:
    return {"dropout": 0.05, "learning_rate": SFT_RATE}


def _load(spec: TrainSettings, tokenizer: Any, reporter: Reporter) -> Load:
    from loram_cli.training.data.documents import load_instructions

    return loader(load_instructions, spec, reporter, tokenizer=tokenizer, train_on=spec.train_on)


def _prepare(
    spec: TrainSettings,
    train: list[Any],
    evaluation: list[Any],
    tokenizer: Any,
    reporter: Reporter,
) -> Prepared:
    from loram_cli.stages.train.options import train_options
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

    def fit(model: Any, path: Path, streamed: "LoraPass | None" = None) -> "FitResult":
        options = train_options(spec, len(train_rows))
        return fit_lora(model, train_rows, eval_rows, options, path, reporter, streamed=streamed)

    lengths = tuple(len(row.input_ids) for row in train_rows)
    return Prepared(len(train_rows), len(eval_rows), fit, lengths, tuple(eval_rows))


OBJECTIVE = Objective(
    title="LoRA training",
    learns_from="instructions",
    settings=_settings,
    load=_load,
    prepare=_prepare,
)
