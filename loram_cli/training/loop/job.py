"""What the loop trains by: data and objective, as far as it has to know of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from loram_cli.arch.spec import Family
from loram_cli.training.data.packing import PackCollator, usable_packing
from loram_cli.training.data.tokens import TokenRow
from loram_cli.training.loop.options import FitOptions

if TYPE_CHECKING:
    from loram_cli.modeling.layerwise.lora_pass import LoraPass
    from loram_cli.training.loop.distill import Teaching


@dataclass(frozen=True, kw_only=True)
class TrainerParts:
    """What the loop hands to whoever builds a trainer.

    Attributes:
        model: To train; its parameters are cast already.
        arguments: Gives the trainer's settings: called with their class and with what the
            objective adds to them, see :func:`.trainer.training_arguments`.
        callbacks: The loop's own.
        options: Of the fit.
        device: Where the model is.
        shared: Whether the model is shared out among processes.
    """

    model: Any
    arguments: Callable[..., Any]
    callbacks: list[Any]
    options: FitOptions
    device: str
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """Data and objective of one training run.

    Attributes:
        label: Of the progress bar.
        digest: Of data and objective: a checkpoint of another one is not resumed.
        evaluates: Whether an evaluation split is there.
        highest_token: The largest token id in the data.
        longest: Tokens of the longest sequence.
        build: Makes the trainer, a transformers ``Trainer``.
        chunked_loss: Whether the loss is the model's own and may be computed in chunks.
    """

    label: str
    digest: str
    evaluates: bool
    highest_token: int
    longest: int
    build: Callable[[TrainerParts], Any]
    chunked_loss: bool = False


def text_job(
    train: Sequence[TokenRow],
    evaluation: Sequence[TokenRow],
    label: str,
    teaching: "Teaching | None" = None,
    streamed: "LoraPass | None" = None,
) -> Job:
    """Next-token prediction on token rows, or a teacher's distribution over them."""
    data = hashlib.sha256()
    highest_token = longest = 0
    for rows in (train, evaluation):
        data.update(f"{len(rows)};".encode())
        for row in rows:
            given = f",{row.given}" if row.given else ""
            data.update(f"{len(row.input_ids)},{row.answer_start}{given};".encode())
            data.update(row.input_ids.tobytes())
            highest_token = max(highest_token, int(row.input_ids.max()))
            longest = max(longest, len(row.input_ids))

    def build(parts: TrainerParts) -> Any:
        from loram_cli.training.loop.distill import DistillTrainer
        from loram_cli.training.loop.trainer import StepTrainer

        trainer_class: Any = StepTrainer
        if parts.shared:
            from loram_cli.training.loop.sharded_trainer import SharedTrainer as trainer_class
        if teaching is not None:
            trainer_class = partial(DistillTrainer, teaching=teaching)
        if streamed is not None:
            from loram_cli.training.loop.streamed_trainer import StreamedTrainer

            trainer_class = partial(StreamedTrainer, streamed=streamed)
        packing = usable_packing(
            parts.options.packing,
            model_family(parts.model),
            parts.model.config._attn_implementation,
        )
        multiple = 8 if parts.device == "cuda" else 1
        return trainer_class(
            model=parts.model,
            args=parts.arguments(),
            data_collator=PackCollator(pad_token_id(parts.model), multiple, packing),
            # Rows of like length share a pass, whether or not they can share a row.
            grouped=parts.options.packing != "off",
            train_dataset=train,
            eval_dataset=evaluation or None,
            callbacks=parts.callbacks,
        )

    return Job(
        label=label,
        digest=data.hexdigest(),
        evaluates=bool(evaluation),
        highest_token=highest_token,
        longest=longest,
        build=build,
        chunked_loss=True,
    )


def model_family(model: Any) -> Family:
    """The family of a causal LM, or of the one inside a PEFT model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family: Family = inner.family
    return family


def highest(sequences: Sequence[np.ndarray]) -> int:
    """The largest token id."""
    return max(int(ids.max()) for ids in sequences)


def pad_token_id(model: Any) -> int:
    """Any valid id does: padding carries no loss, and nothing attends to it."""
    pad = model.config.pad_token_id
    return pad if isinstance(pad, int) and pad >= 0 else 0
