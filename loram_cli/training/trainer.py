"""The door to transformers' Trainer: what it saves, evaluates and reports is decided here."""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from loram_cli.errors import LoramError
from loram_cli.reporting import Progress
from loram_cli.runs.processes import is_main_process, process_count, process_rank
from loram_cli.training.checkpoints import checkpoint_path, mark_whole
from loram_cli.training.options import FitOptions
from loram_cli.training.tokens import IGNORED_LABEL, TokenRow

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged_adamw_8bit": "paged_adamw_8bit"}


class Interruption:
    """Ctrl-C and SIGTERM as a flag, so that the step under way ends and its checkpoint is whole."""

    def __init__(self) -> None:
        self._received: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came while they were caught."""
        return self._received is not None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Turn the first signal of a kind into the flag; a second one acts at once.

        Of several processes a launcher ends the rest with SIGTERM when one has failed; they wait
        for that one then, and no step ends: SIGTERM stays what it was.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM) if process_count() == 1 else (signal.SIGINT,)
        previous = {kind: signal.getsignal(kind) for kind in kinds}

        def handle(number: int, frame: Any) -> None:
            self._received = number
            signal.signal(number, previous[signal.Signals(number)])

        for kind in kinds:
            signal.signal(kind, handle)
        try:
            yield
        finally:
            for kind, handler in previous.items():
                signal.signal(kind, handler)

    def act(self) -> None:
        """Do what the signal would have done, now that its handler is in place again.

        Raises:
            KeyboardInterrupt: Whatever the handler does: the work must not go on.
        """
        assert self._received is not None
        signal.raise_signal(self._received)
        raise KeyboardInterrupt


class StepCallback(TrainerCallback):
    """Reports each step, stops on losses that are not finite and on interrupts."""

    def __init__(
        self, progress: Progress, interruption: Interruption, batch: int, *, evaluates: bool
    ) -> None:
        self._progress = progress
        self._interruption = interruption
        self._batch = batch
        self._evaluates = evaluates
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the steps that a checkpoint has already done."""
        self._began, self._first_step = time.monotonic(), state.global_step
        self._progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; evaluate after the last one."""
        self._progress.advance(1)
        if state.global_step >= state.max_steps and self._evaluates:
            control.should_evaluate = True
        if self._interruption.requested:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show loss and rate.

        Raises:
            LoramError: The loss or its gradient is NaN or infinite; raised before the step's
                checkpoint would be written.
        """
        if not logs or "loss" not in logs:
            return
        for name, key in (("loss", "loss"), ("gradient", "grad_norm")):
            if not math.isfinite(logs.get(key, 0.0)):
                raise LoramError(
                    f"the {name} is {logs[key]} at step {state.global_step}",
                    "lower the learning rate, or use --precision fp32; the last checkpoint is kept",
                )
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (state.global_step - self._first_step) * self._batch / seconds
        self._progress.detail(f"loss {logs['loss']:.3f}, {rate:.1f} samples/s")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has written all files of this step's checkpoint."""
        if not is_main_process():
            return
        mark_whole(checkpoint_path(Path(args.output_dir), state.global_step))


class StepTrainer(Trainer):
    """A Trainer that evaluates per token and keeps embeddings out of LoRA checkpoints."""

    def evaluate(
        self,
        eval_dataset: Sequence[TokenRow] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over all tokens of the evaluation split that carry loss.

        The parent weighs batches by rows, which makes the figure depend on the batch size.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        was_training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        # Rows of like length together, so that little is padding.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
        step = self.args.per_device_eval_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            for i in range(process_rank() * step, len(order), step * process_count()):
                batch = self.data_collator([rows[j] for j in order[i : i + step]])
                batch = {key: tensor.to(self.args.device) for key, tensor in batch.items()}
                tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
                total += float(self.model(**batch).loss) * tokens
                count += tokens
        self.model.train(was_training)
        if process_count() > 1:
            sums = torch.tensor([total, count], dtype=torch.float64, device=self.args.device)
            total, count = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        # Tells the loop that this step has been evaluated.
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The parent would add the whole embedding to a LoRA checkpoint that targets lm_head.
        is_lora = hasattr(self.model, "peft_config")
        extra = {"save_embedding_layers": False} if is_lora else {}
        self.model.save_pretrained(output_dir or self.args.output_dir, **extra)


def training_arguments(
    options: FitOptions, output_dir: Path, *, steps: int, warmup_steps: int, precision: str,
    device: str, evaluates: bool, fresh: bool,
) -> TrainingArguments:  # fmt: skip
    """The trainer's settings for a run of ``steps`` optimizer steps."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=_OPTIMIZERS[options.optimizer],
        per_device_train_batch_size=options.micro_batch,
        per_device_eval_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // (options.micro_batch * process_count()),
        # All factors take part in every pass; looking for unused ones would cost time in each.
        ddp_find_unused_parameters=False,
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.checkpoint_steps,
        # Two: should the newest be cut short by a kill, the one before it is still there.
        save_total_limit=2,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_steps or steps,
        eval_on_start=evaluates and fresh,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=options.seed,
    )
    # Several visible GPUs would be wrapped in DataParallel, which a model placed on one cannot use.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
