"""Training under transformers' Trainer: the door to it, for alignment and for LoRA alike."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.reporting import Progress, Reporter
from loram_cli.training.data import IGNORED_LABEL, TokenRow

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to train.

    Attributes:
        learning_rate: Peak of the cosine schedule.
        max_steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up.
        batch: Rows per optimizer step.
        micro_batch: Rows per forward pass; gradients accumulate up to ``batch``.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between evaluations of the held-out rows.
        seed: Decides order and dropout.
        gradient_checkpointing: Trade time for activation memory.
        bf16: Compute in bfloat16 under autocast.
    """

    learning_rate: float
    max_steps: int
    warmup_steps: int
    batch: int
    micro_batch: int
    save_steps: int
    eval_steps: int
    seed: int
    gradient_checkpointing: bool
    bf16: bool


@dataclass(frozen=True)
class LossPoint:
    """One point of the loss curve; ``split`` is ``train`` or ``eval``."""

    step: int
    split: str
    loss: float


def fit(
    model: Any,
    tokenizer: Any,
    train_rows: list[TokenRow],
    eval_rows: list[TokenRow],
    options: FitOptions,
    work_dir: Path,
    reporter: Reporter,
) -> list[LossPoint]:
    """Train whatever parameters require gradients, resuming from the newest whole checkpoint.

    Args:
        model: A causal LM, or one wrapped by PEFT.
        tokenizer: Gives the padding.
        train_rows: Rows to learn.
        eval_rows: Rows held out; may be empty.
        options: How to train.
        work_dir: Where checkpoints are kept while training goes on.
        reporter: Told of steps, loss and rate.

    Returns:
        The loss curve, from the first step on, across interruptions.

    Raises:
        LoramError: The loss is not finite.
    """
    import transformers

    accumulation = options.batch // options.micro_batch
    on_gpu = model.device.type == "cuda"
    arguments = transformers.TrainingArguments(
        output_dir=str(work_dir / CHECKPOINTS),
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(options.warmup_steps, options.max_steps // 2),
        per_device_train_batch_size=options.micro_batch,
        per_device_eval_batch_size=options.micro_batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=options.bf16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=options.seed,
        logging_steps=max(1, options.max_steps // 100),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if eval_rows else "no",
        eval_steps=options.eval_steps,
        eval_on_start=bool(eval_rows),
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    resume_from = newest_checkpoint(work_dir / CHECKPOINTS)
    with reporter.progress("train", options.max_steps, "step") as progress:
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows or None,
            data_collator=transformers.DataCollatorForSeq2Seq(
                tokenizer, label_pad_token_id=IGNORED_LABEL
            ),
            callbacks=[_make_callback(transformers.TrainerCallback, progress)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if resume_from is not None:
            reporter.note(f"resuming from step {resume_from.name.rpartition('-')[2]}")
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if eval_rows and options.max_steps % options.eval_steps:
            trainer.evaluate()
    shutil.rmtree(work_dir / CHECKPOINTS, ignore_errors=True)
    return _curve(trainer.state.log_history)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are removed.

    The trainer writes ``trainer_state.json`` last, so its presence and soundness mark a whole one.
    """
    whole = None
    steps = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*")]
    for _, path in sorted(steps):
        try:
            json.loads((path / "trainer_state.json").read_text("utf-8"))
            whole = path
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return whole


def _make_callback(parent: type, progress: Progress) -> Any:
    class Forward(parent):
        """Passes the trainer's events on, and stops at a loss that is not finite."""

        seen = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress.advance(state.global_step - self.seen)
            self.seen = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            for name in ("loss", "eval_loss"):
                if name not in logs:
                    continue
                if not math.isfinite(logs[name]):
                    raise LoramError(
                        f"{name} is {logs[name]} at step {state.global_step}",
                        "lower --learning-rate, and check the data",
                    )
                progress.detail(f"{name} {logs[name]:.3f}")

    return Forward()


def _curve(history: list[dict[str, Any]]) -> list[LossPoint]:
    points = []
    for row in history:
        for name, split in (("loss", "train"), ("eval_loss", "eval")):
            if name in row:
                points.append(LossPoint(int(row["step"]), split, float(row[name])))
    return points
