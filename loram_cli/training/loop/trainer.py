"""The door to transformers' Trainer: what it saves, evaluates and reports is decided here."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from loram_cli.errors import LoramError
from loram_cli.reporting import Progress, Reporter
from loram_cli.runs.processes import is_main_process, process_count, process_rank
from loram_cli.runs.whole import mark_whole
from loram_cli.training.data.packing import arranged, padded_tokens
from loram_cli.training.data.tokens import IGNORED_LABEL, TokenRow
from loram_cli.training.distributed import any_process, wait_for_all
from loram_cli.training.loop.checkpoints import checkpoint_path, newest_whole
from loram_cli.training.loop.options import FitOptions
from loram_cli.training.loop.order import EndlessOrder

# Shown beside the loss, where an objective has them.
_TOLD = {"rewards/accuracies": "preference accuracy", "reward": "reward"}
# After so many steps without any reward, the user is warned.
_STEPS_WITHOUT_REWARD = 10
# transformers' own "constant" leaves out the warm-up.
_SCHEDULERS = {"constant": "constant_with_warmup"}
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged_adamw_8bit": "paged_adamw_8bit"}
_SAME_CTRL_C_SECONDS = 2.0


class Interruption:
    """Ctrl-C and SIGTERM as a flag, so that the step under way ends and its checkpoint is whole."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._since = 0.0

    def request(self, number: int = signal.SIGINT) -> None:
        """Raise the flag, as the signal of this number does."""
        self._received, self._since = number, time.monotonic()

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
            if process_count() == 1:
                self.request(number)
                signal.signal(number, previous[signal.Signals(number)])
            elif not self.requested:
                self.request(number)
            elif time.monotonic() - self._since > _SAME_CTRL_C_SECONDS:
                # Sooner, it is the Ctrl-C that a launcher hands on from the terminal.
                signal.signal(number, previous[signal.Signals(number)])
                raise KeyboardInterrupt

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
        self,
        progress: Progress,
        interruption: Interruption,
        batch: int,
        reporter: Reporter,
        evaluates: bool,
    ) -> None:
        self._progress = progress
        self._interruption = interruption
        self._batch = batch
        self._reporter = reporter
        self._evaluates = evaluates
        self._began = 0.0
        self._first_step = 0
        self._tokens_of: Callable[[int], StepTokens] | None = None
        # Of all steps, and of those since the start.
        self.tokens = self._since = StepTokens(0, 0)

    def count_tokens(self, tokens_of: Callable[[int], "StepTokens"]) -> None:
        """Tell real tokens a second as well.

        Args:
            tokens_of: Gives those of a step, counted from 1.
        """
        self._tokens_of = tokens_of

    def catch_up(self, steps: int) -> None:
        """Count the tokens of steps that were done before this start."""
        self.tokens = self._tokens_in(range(1, steps + 1))

    def _tokens_in(self, steps: Iterable[int]) -> "StepTokens":
        if self._tokens_of is None:
            return StepTokens(0, 0)
        counts = [self._tokens_of(step) for step in steps]
        return StepTokens(sum(n.real for n in counts), sum(n.computed for n in counts))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the steps that a checkpoint has already done."""
        self._began, self._first_step = time.monotonic(), state.global_step
        self._progress.skip(state.global_step)
        self.catch_up(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; evaluate after the last one."""
        self._progress.advance(1)
        mine = self._tokens_in([state.global_step])
        self.tokens, self._since = (
            StepTokens(n.real + mine.real, n.computed + mine.computed)
            for n in (self.tokens, self._since)
        )
        if state.global_step >= state.max_steps and self._evaluates:
            control.should_evaluate = True
        if any_process(self._interruption.requested):
            # On every process at the same step, whenever the signal came to each of them.
            if not self._interruption.requested:
                self._interruption.request()
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
                kept = newest_whole(Path(args.output_dir))
                more = f"; the checkpoint of step {kept} is kept" if kept else ""
                raise LoramError(
                    f"the {name} is {logs[key]} at step {state.global_step}",
                    f"lower the learning rate, or use --precision fp32{more}",
                )
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (state.global_step - self._first_step) * self._batch / seconds
        told = [f"loss {logs['loss']:.3f}"]
        told += [f"{word} {logs[key]:.2f}" for key, word in _TOLD.items() if key in logs]
        told.append(f"{rate:.1f} samples/s")
        if self._since.real:
            told.append(f"{self._since.real / seconds:,.0f} tokens/s")
        self._progress.detail(", ".join(told))
        if state.global_step == _STEPS_WITHOUT_REWARD and logs.get("reward") == 0:
            earlier = [entry["reward"] for entry in state.log_history if "reward" in entry]
            if not any(earlier):
                self._reporter.warn(
                    f"no completion has earned a reward in the first {_STEPS_WITHOUT_REWARD} "
                    "steps, so nothing is learnt: teach the answers' format first "
                    "(train --objective sft), then start from that adapter (--from-adapter)"
                )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every process has written its files of this step's checkpoint."""
        wait_for_all()
        if is_main_process():
            mark_whole(checkpoint_path(Path(args.output_dir), state.global_step))


class LeanCheckpoints:
    """Mixed into a Trainer: LoRA checkpoints hold the trained adapter and no embedding."""

    model: Any
    args: Any

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # The parent would add the whole embedding to a LoRA checkpoint that targets lm_head, and
        # the frozen copy that serves as a reference.
        extra: dict[str, Any] = {}
        if hasattr(self.model, "peft_config"):
            extra = {"save_embedding_layers": False, "selected_adapters": ["default"]}
        self.model.save_pretrained(output_dir or self.args.output_dir, **extra)


class WholeBatches:
    """Mixed into a Trainer: every step has exactly ``--batch`` rows."""

    args: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order(self.train_dataset if train_dataset is None else train_dataset)

    def _order(self, rows: Any, lengths: Sequence[int] = ()) -> EndlessOrder:
        args = self.args
        batch = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * process_count()
        )
        return EndlessOrder(len(rows), batch, args.seed, lengths)


class StepTokens(NamedTuple):
    """Tokens of optimizer steps, of all processes together.

    Attributes:
        real: Of the examples.
        computed: That the model runs on, padding included.
    """

    real: int
    computed: int


class StepTrainer(WholeBatches, LeanCheckpoints, Trainer):
    """A Trainer of whole batches that evaluates per token and keeps checkpoints lean.

    Args:
        args: As the parent takes them.
        grouped: Whether rows of like length share a forward pass.
        kwargs: As the parent takes them.
    """

    control: Any

    def __init__(self, *args: Any, grouped: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths = [len(row.input_ids) for row in self.train_dataset]
        self._steps = self._order(self._lengths, self._lengths if grouped else ())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._steps

    def step_tokens(self, step: int) -> StepTokens:
        """Tokens of an optimizer step, counted from 1."""
        lengths = [self._lengths[row] for row in self._steps.step(step - 1)]
        collator: Any = self.data_collator
        computed = 0
        for begin in range(0, len(lengths), self.args.per_device_train_batch_size):
            some = lengths[begin : begin + self.args.per_device_train_batch_size]
            layout = arranged(some, collator.packing, multiple=collator.multiple)
            computed += padded_tokens(layout, some, multiple=collator.multiple)
        return StepTokens(sum(lengths), computed)

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
        batches = [order[i : i + step] for i in range(0, len(order), step)]
        firsts = range(process_rank(), len(batches) + process_rank(), process_count())
        with torch.no_grad(), self.compute_loss_context_manager():
            # A model that is shared out runs on all processes or on none.
            mine = ([rows[j] for j in batches[min(i, len(batches) - 1)]] for i in firsts)
            for i, (loss, tokens) in zip(firsts, self._batch_losses(mine), strict=True):
                if i < len(batches):
                    total += loss * tokens
                    count += tokens
        self.model.train(was_training)
        if process_count() > 1:
            sums = torch.tensor([total, count], dtype=torch.float64, device=self.args.device)
            total, count = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        # The loop then knows that this step has been evaluated.
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _batch_losses(self, batches: Iterable[list[TokenRow]]) -> Iterator[tuple[float, int]]:
        """Each batch's mean loss, and how many of its tokens carry loss."""
        for rows in batches:
            batch = self._collated(rows)
            tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
            yield float(self.model(**batch).loss), tokens

    def _collated(self, rows: list[TokenRow]) -> dict[str, torch.Tensor]:
        batch = self.data_collator(rows)
        return {key: tensor.to(self.args.device) for key, tensor in batch.items()}


def training_arguments(
    options: FitOptions, output_dir: Path, *, steps: int, warmup_steps: int, precision: str,
    device: str, evaluates: bool, fresh: bool, shared: bool = False,
    arguments_class: type[TrainingArguments] = TrainingArguments, **more: Any,
) -> TrainingArguments:  # fmt: skip
    """The trainer's settings for a run of ``steps`` optimizer steps."""
    arguments = arguments_class(
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULERS.get(options.lr_scheduler, options.lr_scheduler),
        warmup_steps=warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=_OPTIMIZERS[options.optimizer],
        per_device_train_batch_size=options.micro_batch,
        per_device_eval_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // (options.micro_batch * process_count()),
        # All factors take part in every pass; looking for unused ones would cost time in each.
        ddp_find_unused_parameters=False,
        accelerator_config=_each_micro_batch() if shared else None,
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
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
        # TRL's own default, which its trainers do not use, may have the same name.
        **{**more, **_checkpointing(arguments_class, options.gradient_checkpointing)},
    )
    # Several visible GPUs would be wrapped in DataParallel, which a model placed on one cannot use.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _checkpointing(arguments_class: type[TrainingArguments], enabled: bool) -> dict[str, Any]:
    # Renamed in transformers 5.2x; older TrainingArguments know only the older name.
    known = {field.name for field in fields(arguments_class)}
    name = f"{'activation' if 'activation_checkpointing' in known else 'gradient'}_checkpointing"
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False}}


def _each_micro_batch() -> dict[str, Any]:
    # To sum whole gradients over a batch's passes would take a whole model's memory.
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
