"""Shared by align and train: device, options, memory warning, loss curve."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loram_cli.errors import UsageError
from loram_cli.memory.training import CUDA_CONTEXT_BYTES
from loram_cli.modeling.free_memory import free_memory_bytes
from loram_cli.modeling.load import (
    default_device,
    slow_in_bf16,
    usable_device,
    warn_of_unused_gpu,
)
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process, local_device, process_count
from loram_cli.stages.core.plan import StagePlan
from loram_cli.stages.fit.launchers import forget_launcher, tell_launcher
from loram_cli.stages.fit.spec import FitSpec
from loram_cli.training.curves import draw_curve, write_curve_csv
from loram_cli.training.distributed import join_processes, wait_for_all
from loram_cli.training.loop.options import (
    FIGURES,
    FitOptions,
    FitResult,
    resolve_precision,
)
from loram_cli.training.tracking import check_trackers
from loram_cli.units import format_bytes

# Of the steps, where warm-up is not told: the warmup_ratio of QLoRA's code.
WARMUP_SHARE = 0.03

S = TypeVar("S", bound=FitSpec)
W = TypeVar("W")


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


def check_device(spec: FitSpec) -> str:
    """The device of this process, once it and the trackers are known to do what is asked for.

    Raises:
        LoramError: A tracker is not installed.
        UsageError: There is no such device, the optimizer needs a GPU, or the batch does not divide
            among the processes.
    """
    check_trackers(spec.report_to)
    processes = process_count()
    if spec.batch % (spec.micro_batch * processes):
        raise UsageError(
            f"--batch {spec.batch} does not divide into --micro-batch {spec.micro_batch} "
            f"on {processes} processes",
            f"pass a multiple of {spec.micro_batch * processes} as --batch",
        )
    asked = spec.device or default_device()
    if asked.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {asked}: cannot train there", "pass cpu, cuda or cuda:1")
    device = usable_device(local_device(asked))
    check_optimizer(spec.optimizer, device)
    return device


def fit_device(spec: FitSpec, reporter: Reporter) -> str:
    """Where this process computes; with several processes it joins the others.

    Raises:
        UsageError: See :func:`check_device`.
    """
    device = check_device(spec)
    warn_of_unused_gpu(spec.device, reporter)
    if spec.precision == "bf16" and slow_in_bf16(device):
        reporter.warn(
            "--precision bf16: this CPU has no instructions for it, and takes many times as long "
            "as in fp32; leave --precision out"
        )
    tell_launcher(spec, resolve_precision(spec.precision, device), reporter)
    forget_launcher()
    join_processes(device)
    return device


def fit_options(spec: FitSpec, examples: int = 0) -> FitOptions:
    """The spec's share that says how to fit.

    Args:
        spec: Of the stage.
        examples: Rows to learn from, as ``batch`` counts them: epochs are steps by their number.
    """
    assert spec.learning_rate is not None
    steps = spec.steps_for(examples)
    warmup = spec.warmup_steps
    return FitOptions(
        learning_rate=spec.learning_rate,
        steps=steps,
        warmup_steps=round(WARMUP_SHARE * steps) if warmup is None else warmup,
        lr_scheduler=spec.lr_scheduler,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
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


def held_out(asked: int, rows: int, flag: str, reporter: Reporter) -> int:
    """How many of the rows to hold out: those asked for, at most a tenth.

    Args:
        asked: By the flag.
        rows: In the data.
        flag: To name where it is capped.
        reporter: Told of that.
    """
    most = rows // 10
    if asked > most:
        reporter.note(f"{flag} {asked} exceeds a tenth of the data: holding out {most} of {rows}")
    return min(asked, most)


def plan_together(
    plan: Callable[[S, Reporter], StagePlan[W]], spec: S, reporter: Reporter
) -> StagePlan[W]:
    """The stage's plan, made by every process before the first one locks the output."""
    planned = plan(spec, reporter)
    wait_for_all()
    return planned


def warn_of_memory(
    planned: StagePlan[Any], smaller: Sequence[str], device: str, reporter: Reporter
) -> None:
    """Say before the first tensor is read that the device will not hold the training.

    It is no refusal: the prediction is an upper bound in places, and memory may become free.
    """
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


def finish_fit(
    fitted: FitResult, path: Path, title: str, step: int | None = None
) -> dict[str, Any]:
    """Draw the loss curve, and give the losses for the stage's result.

    Args:
        fitted: What was reached.
        path: Where the curve goes.
        title: Its headline.
        step: The one whose weights are the output; None for the last.
    """
    if is_main_process():
        write_curve_csv(fitted.history, path / "loss.csv")
        draw_curve(fitted.history, path / "loss.png", title)
    evals = fitted.eval_losses(step)
    results = {
        "final_train_loss": round(fitted.final_loss, 4),
        "eval_loss_before": round(evals[0], 4) if evals else None,
        "eval_loss_after": round(evals[1], 4) if evals else None,
    }
    more: dict[str, float] = {}
    for name, (first, last) in fitted.first_and_last("eval").items():
        more |= {f"eval_{name}_before": round(first, 4), f"eval_{name}_after": round(last, 4)}
    for name, mean in fitted.final_figures().items():
        more[f"final_train_{name}"] = round(mean, 4)
    # Of several rewards, each has the name that the user gave it.
    rewards = {key: more.pop(key) for key in list(more) if not _is_own_figure(key)}
    return {**results, **more, **({"rewards": rewards} if rewards else {})}


def _is_own_figure(key: str) -> bool:
    return any(
        key in (f"eval_{name}_before", f"eval_{name}_after", f"final_train_{name}")
        for name in FIGURES.values()
    )
