"""What alignment and LoRA training do alike: options of the fit, and what is left of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process, local_device, process_count
from loram_cli.stages.core.lifecycle import check_positive
from loram_cli.stages.fit.launchers import forget_launcher, tell_launcher
from loram_cli.units import format_bytes

if TYPE_CHECKING:
    from loram_cli.memory.setup import TrainingSetup
    from loram_cli.stages.align.stage import AlignSpec
    from loram_cli.stages.core.plan import StagePlan
    from loram_cli.stages.train.stage import TrainSpec
    from loram_cli.training.loop.options import FitOptions, FitResult


def check_fit(spec: "AlignSpec | TrainSpec") -> None:
    """Refuse settings of the fit that cannot be.

    Raises:
        UsageError: A number that must be above zero is not, or the batch does not divide.
    """
    check_positive(spec, "learning_rate", "steps", "batch", "micro_batch")
    check_positive(spec, "save_steps", "eval_steps")
    if spec.batch % spec.micro_batch:
        raise UsageError(f"--batch {spec.batch} is no multiple of --micro-batch {spec.micro_batch}")


def check_optimizer(optimizer: str, device: str) -> None:
    """Refuse an optimizer that the device cannot run.

    Raises:
        UsageError: It needs a GPU.
    """
    if optimizer == "paged_adamw_8bit" and not device.startswith("cuda"):
        raise UsageError(
            f"--optimizer {optimizer} needs a GPU, and this runs on '{device}'",
            "pass --optimizer adamw",
        )


def fit_device(spec: "AlignSpec | TrainSpec", reporter: Reporter) -> str:
    """Where this process computes; with several processes it joins the others.

    Args:
        spec: How to fit.
        reporter: Told of what the launcher asks for in vain.

    Raises:
        UsageError: There is no such device, the optimizer needs a GPU, or the batch does not divide
            among the processes.
    """
    from loram_cli.modeling.load import default_device, usable_device
    from loram_cli.training.distributed import join_processes
    from loram_cli.training.loop.options import resolve_precision

    processes = process_count()
    if spec.batch % (spec.micro_batch * processes):
        raise UsageError(
            f"--batch {spec.batch} does not divide into --micro-batch {spec.micro_batch} "
            f"on {processes} processes",
            f"pass a multiple of {spec.micro_batch * processes} as --batch",
        )
    device = usable_device(local_device(spec.device or default_device()))
    check_optimizer(spec.optimizer, device)
    tell_launcher(spec, resolve_precision(spec.precision, device), reporter)
    forget_launcher()
    join_processes(device)
    return device


def fit_options(spec: "AlignSpec | TrainSpec") -> "FitOptions":
    """The spec's share that says how to fit."""
    from loram_cli.training.loop.options import FitOptions

    return FitOptions(
        learning_rate=spec.learning_rate,
        steps=spec.steps,
        warmup_steps=spec.warmup_steps,
        batch=spec.batch,
        micro_batch=spec.micro_batch,
        checkpoint_steps=spec.save_steps,
        eval_steps=spec.eval_steps,
        seed=spec.seed,
        gradient_checkpointing=spec.gradient_checkpointing,
        cross_entropy=spec.cross_entropy,
        optimizer=spec.optimizer,
        precision=spec.precision,
        report_to=spec.report_to,
    )


def plan_together(
    plan: Callable[..., "StagePlan"], spec: "AlignSpec | TrainSpec", reporter: Reporter
) -> "StagePlan":
    """The stage's plan, made by every process before the first one locks the output."""
    from loram_cli.training.distributed import wait_for_all

    planned = plan(spec, reporter)
    wait_for_all()
    return planned


def warn_of_memory(
    planned: "StagePlan", smaller: Sequence[str], device: str, reporter: Reporter
) -> None:
    """Say before the first tensor is read that the device will not hold the training.

    It is no refusal: the prediction is an upper bound in places, and memory may become free.

    Args:
        planned: With the memory by arithmetic.
        smaller: Flags that would make it less.
        device: Of this process.
        reporter: Told.
    """
    from loram_cli.memory.training import CUDA_CONTEXT_BYTES
    from loram_cli.modeling.free_memory import free_memory_bytes

    # The context is there already when a GPU is asked what it has left.
    there_bytes = CUDA_CONTEXT_BYTES if device.startswith("cuda") else 0
    free_bytes = free_memory_bytes(device)
    if planned.memory_bytes - there_bytes <= free_bytes:
        return
    ways = f"; {', '.join(smaller)} would make it less" if smaller else ""
    reporter.warn(
        f"by arithmetic this takes {format_bytes(planned.memory_bytes)}, and {device} has "
        f"{format_bytes(free_bytes)} free{ways}"
    )


def training_setup(
    spec: "TrainSpec",
    targets: tuple[str, ...],
    config: Mapping[str, Any],
    *,
    device: str,
    precision: Literal["fp32", "bf16"],
) -> "TrainingSetup":
    """What the memory account has to know of a spec."""
    from loram_cli.memory.setup import TrainingSetup, usual_attention

    return TrainingSetup(
        rank=spec.rank,
        targets=targets,
        dropout=spec.dropout or 0.0,
        quantize=spec.quantize,
        # A pair is two sequences in one pass.
        micro_batch=spec.micro_batch * (2 if spec.objective == "dpo" else 1),
        length=spec.max_length,
        gradient_checkpointing=spec.gradient_checkpointing,
        attention=usual_attention(config) if spec.attention == "auto" else spec.attention,
        cross_entropy=spec.cross_entropy,
        optimizer=spec.optimizer,
        precision=precision,
        device="cpu" if device == "cpu" else "cuda",
        processes=process_count() if spec.fsdp else 1,
    )


def prepare_tracking(spec: "AlignSpec | TrainSpec") -> None:
    """Refuse trackers that are not installed.

    Raises:
        LoramError: Names the package, and how to get it.
    """
    if spec.report_to:
        from loram_cli.training.tracking import check_trackers

        check_trackers(spec.report_to)


def finish_fit(fitted: "FitResult", path: Path, title: str) -> dict[str, Any]:
    """Draw the loss curve, and give the losses for the manifest.

    Args:
        fitted: What the fit gave back.
        path: The stage's directory.
        title: Headline of the picture.
    """
    from loram_cli.training.curves import draw_curve, write_curve_csv

    if is_main_process():
        write_curve_csv(fitted.history, path / "loss.csv")
        draw_curve(fitted.history, path / "loss.png", title)
    evals = fitted.eval_losses()
    results = {
        "final_train_loss": round(fitted.final_loss, 4),
        "eval_loss_before": round(evals[0], 4) if evals else None,
        "eval_loss_after": round(evals[1], 4) if evals else None,
    }
    for name, (first, last) in fitted.first_and_last("eval").items():
        results |= {f"eval_{name}_before": round(first, 4), f"eval_{name}_after": round(last, 4)}
    for name, mean in fitted.final_figures().items():
        results[f"final_train_{name}"] = round(mean, 4)
    return results
