"""Trains a model: full parameters on text (alignment), or a LoRA adapter on examples.

Both go through transformers' Trainer. A run leaves checkpoints in ``work_dir/checkpoints`` and
resumes at the newest whole one when it is started again with the same settings and data.
"""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loram_cli.errors import LoramError, UsageError
from loram_cli.modeling.chunked_loss import chunked_loss, restore_forward
from loram_cli.quiet import no_progress_bars, quiet_libraries
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process, process_count
from loram_cli.training.adapters import save_adapter
from loram_cli.training.data.tokens import TokenRow
from loram_cli.training.distributed import share
from loram_cli.training.loop.checkpoints import Found, fingerprint, newest_checkpoint
from loram_cli.training.loop.compiled import compiled_layers
from loram_cli.training.loop.job import Job, TrainerParts, text_job
from loram_cli.training.loop.masks import keep_zeros
from loram_cli.training.loop.options import (
    FitOptions,
    FitResult,
    curve_rows,
    evaluations_since_best,
    resolve_precision,
)
from loram_cli.training.tracking import tracking_callbacks

if TYPE_CHECKING:
    from loram_cli.modeling.layerwise.lora_pass import LoraPass
    from loram_cli.training.loop.distill import Teaching


def fit_causal_text(
    model: Any,
    train: Sequence[TokenRow],
    evaluation: Sequence[TokenRow],
    options: FitOptions,
    work_dir: Path,
    reporter: Reporter,
    *,
    masked: Sequence[str] = (),
    teaching: "Teaching | None" = None,
) -> FitResult:
    """Train a pruned model on packed text: its words, or a teacher's logits.

    Args:
        model: A causal LM of which some parameters require gradients, changed in place; those
            become fp32.
        train: Packed blocks, see :func:`.tokens.pack_tokens`.
        evaluation: Blocks set aside; may be empty.
        options: How.
        work_dir: Where checkpoints are kept.
        reporter: Progress and warnings.
        masked: Names of weights whose zeros are to stay, see :mod:`.masks`.
        teaching: The full model to learn from; None learns the text itself. Evaluation losses
            are of the text either way.

    Raises:
        LoramError: The loss is not finite, or a token is outside the vocabulary.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint of the step under way is written;
            after SIGTERM, what its handler raises.
    """
    hooks = keep_zeros(model, masked)
    try:
        label = "align" if teaching is None else "distill"
        job = text_job(train, evaluation, label, teaching)
        return fit_job(model, job, options, work_dir, reporter)
    finally:
        for hook in hooks:
            hook.remove()


def fit_lora(
    model: Any,
    train: Sequence[TokenRow],
    evaluation: Sequence[TokenRow],
    options: FitOptions,
    work_dir: Path,
    reporter: Reporter,
    *,
    streamed: "LoraPass | None" = None,
) -> FitResult:
    """Train the LoRA factors of a PEFT model.

    Layer by layer where a pass is given as ``streamed`` (see
    :func:`loram_cli.modeling.layerwise.lora_pass.streamed_lora`), else with the model resident;
    either resumes from the other's checkpoints.

    Raises:
        LoramError: The loss is not finite, or a token is outside the vocabulary.
        UsageError: Layer by layer: with several processes, or with a cross-entropy that is not
            in chunks.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint of the step under way is written;
            after SIGTERM, what its handler raises.
    """
    if streamed is not None:
        _check_streamed(options)
        # Layers are always run again; doing so inside of them as well would save nothing.
        options = replace(options, gradient_checkpointing=False)
    job = text_job(train, evaluation, "train", streamed=streamed)
    return fit_job(model, job, options, work_dir, reporter)


def save_causal_lm(model: Any, out: Path, *, dtype: torch.dtype) -> None:
    """Write a trained model as an ordinary Hugging Face directory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    with quiet_libraries(), no_progress_bars():
        model.save_pretrained(out, max_shard_size="5GB")


def fit_job(
    model: Any, job: Job, options: FitOptions, work_dir: Path, reporter: Reporter
) -> FitResult:
    """Train by any objective: checkpoints, resuming, progress and interrupts are the same for all.

    Raises:
        LoramError: The loss is not finite, or a token is outside the vocabulary.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint of the step under way is written.
    """
    with quiet_libraries(), no_progress_bars():
        # Imported here, where the libraries' own lines are kept quiet.
        from loram_cli.training.loop.trainer import Interruption, StepCallback, training_arguments

        _check_tokens(model, job, reporter)
        device = next(model.parameters()).device.type
        precision = resolve_precision(options.precision, device)
        shared = _is_shared(model)
        if not shared:  # else its slices are what they are to be
            _cast_parameters(model, precision)
        trainable = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        steps = options.steps
        warmup_steps = _fitting_warmup(options.warmup_steps, steps, reporter)
        folder = work_dir / "checkpoints"
        same = fingerprint(options, precision, job.digest, trainable, shared)
        found = share(newest_checkpoint(folder, same) if is_main_process() else None)
        for line in found.warnings(shared):
            reporter.warn(line)
        if found.path is not None:
            reporter.note(f"resuming at step {found.step} of {steps}")
        arguments = partial(
            training_arguments,
            options,
            folder,
            steps=steps,
            warmup_steps=warmup_steps,
            precision=precision,
            device=device,
            evaluates=job.evaluates,
            fresh=found.path is None,
            shared=shared,
        )
        interruption, main = Interruption(), is_main_process()
        in_chunks = job.chunked_loss and options.cross_entropy == "chunked"
        chunks = chunked_loss(model) if in_chunks else nullcontext()
        compiled = compiled_layers(model, options.compile_layers)
        if options.compile_layers:
            reporter.note("compiling the layers: the first steps take a minute or two longer")
        use_cache = model.config.use_cache
        model.config.use_cache = False
        try:
            bar = reporter.progress(job.label, steps, "step")
            with chunks, compiled, interruption.caught(), bar as progress:
                told = StepCallback(progress, interruption, options.batch, reporter, job.evaluates)
                callbacks = [
                    *_keeping(model, options, folder, shared, reporter),
                    told,
                    *(tracking_callbacks(options.report_to, work_dir) if main else ()),
                ]
                trainer = job.build(
                    TrainerParts(
                        model=model,
                        arguments=arguments,
                        callbacks=callbacks,
                        options=options,
                        device=device,
                        shared=shared,
                    )
                )
                _remove_printer(trainer)
                if hasattr(trainer, "step_tokens"):
                    told.count_tokens(trainer.step_tokens)
                ended = _ended(found, options)
                if ended is not None:
                    # All steps are done; the trainer itself would begin another one.
                    trainer._load_from_checkpoint(str(found.path))
                    progress.skip(steps)
                    done, log = ended["global_step"], ended["log_history"]
                    told.catch_up(done)
                else:
                    trainer.train(resume_from_checkpoint=found.path and str(found.path))
                    done, log = trainer.state.global_step, trainer.state.log_history
        finally:
            model.config.use_cache = use_cache
            if not in_chunks:
                restore_forward(model)
        if interruption.requested:
            # After the last step as well: what is asked to stop must not exit with success.
            reporter.note(f"stopped at step {done} of {steps}; the same command resumes there")
            interruption.act()
        # Takes off the mixed-precision wrapper that the trainer put around forward.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if options.gradient_checkpointing:
            _disable_checkpointing(model)
    model.eval()
    return FitResult(
        steps=done,
        history=curve_rows(log),
        trainable_params=sum(math.prod(shape) for shape in trainable.values()),
        precision=precision,
        resumed_from=found.step or None,
        tokens=told.tokens.real,
        computed_tokens=told.tokens.computed,
    )


def _ended(found: Found, options: FitOptions) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint whose training has ended; None while unfinished."""
    if found.path is None:
        return None
    state: dict[str, Any] = json.loads((found.path / "trainer_state.json").read_text("utf-8"))
    patience = options.early_stopping
    since = evaluations_since_best(curve_rows(state["log_history"]))
    stopped = patience is not None and since >= patience
    return state if found.step >= options.steps or stopped else None


def _keeping(
    model: Any, options: FitOptions, folder: Path, shared: bool, reporter: Reporter
) -> list[Any]:
    """What keeps adapters of checkpoints, where they are to be kept."""
    if options.keep_checkpoints is None:
        return []
    from loram_cli.modeling.sharding import whole_trained_weights
    from loram_cli.training.loop.kept import KeepAdapters

    def save(path: Path) -> None:
        weights = whole_trained_weights(model) if shared else None
        if is_main_process():
            save_adapter(model, path, weights=weights)

    count, patience = options.keep_checkpoints, options.early_stopping
    return [KeepAdapters(folder, count, patience, save, reporter)]


def _check_streamed(options: FitOptions) -> None:
    if process_count() > 1:
        raise UsageError(
            f"training layer by layer runs in one process, and there are {process_count()}",
            "start it without torchrun, or use --fsdp",
        )
    if options.cross_entropy != "chunked":
        raise UsageError(
            f"--cross-entropy {options.cross_entropy} does not go with training layer by layer",
            "pass --cross-entropy chunked",
        )


def _check_tokens(model: Any, job: Job, reporter: Reporter) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if job.highest_token >= vocabulary:
        raise LoramError(
            f"the tokenizer gives token {job.highest_token}, "
            f"but the model has only {vocabulary} embeddings",
            "the model's directory must hold its own tokenizer",
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and job.longest > positions:
        reporter.warn(f"sequences of {job.longest} tokens exceed the model's {positions} positions")


def _disable_checkpointing(model: Any) -> None:
    # Renamed in transformers 5.2x, where the older name warns.
    disable = getattr(model, "activation_checkpointing_disable", None)
    (disable or model.gradient_checkpointing_disable)()


def _is_shared(model: Any) -> bool:
    if process_count() == 1:
        return False
    from loram_cli.modeling.sharding import is_shared

    return is_shared(model)


def _cast_parameters(model: Any, precision: str) -> None:
    """Trained parameters to fp32, and without mixed precision all others too.

    Parameter by parameter, because a quantized model refuses ``float()``; packed 4-bit weights
    are integers and stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or precision == "fp32"):
            parameter.data = parameter.data.to(torch.float32)


def _fitting_warmup(warmup_steps: int, steps: int, reporter: Reporter) -> int:
    if warmup_steps < steps:
        return warmup_steps
    shorter = steps // 10
    reporter.warn(f"warm-up cut from {warmup_steps} to {shorter}: there are only {steps} steps")
    return shorter


def _remove_printer(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
