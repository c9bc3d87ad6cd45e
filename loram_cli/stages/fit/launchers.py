"""What ``accelerate launch`` asks for in the environment, and what of it this tool does.

Its flags and its config file reach a program as variables, which transformers' Trainer would
follow past the spec: another precision, a compiled model, DeepSpeed. The model is shared out as
asked for; the rest is refused or told, so that a manifest never says anything but what was done.
"""

import os
from dataclasses import replace
from typing import TypeVar

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import process_count
from loram_cli.stages.fit.spec import FitSpec

Fit = TypeVar("Fit", bound=FitSpec)

_FSDP = "ACCELERATE_USE_FSDP"
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_COMPILER = "ACCELERATE_DYNAMO_BACKEND"
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def as_launched(spec: Fit) -> Fit:
    """The spec, with ``fsdp`` set where the launcher asks for it (``accelerate launch``).

    Raises:
        UsageError: The model cannot be shared out among the processes, or not in the way asked for.
    """
    for variable, name in _OTHER_WAYS.items():
        if _launcher_asks(variable):
            raise UsageError(
                f"the launcher asks for {name}, which loram does not train with",
                "accelerate launch --multi_gpu, or --use_fsdp for a model that one GPU cannot hold",
            )
    if _launcher_asks(_FSDP):
        spec = replace(spec, fsdp=True)
    if spec.fsdp:
        _check_fsdp(spec)
    return spec


def tell_launcher(spec: FitSpec, precision: str, reporter: Reporter) -> None:
    """Warn of what the launcher asks for and does not get."""
    asked = os.environ.get(_PRECISION, "no")
    if asked not in ("no", precision):
        reporter.warn(
            f"the launcher's mixed precision {asked} is ignored: "
            f"--precision decides, and this trains in {precision}"
        )
    compiler = os.environ.get(_COMPILER, "no").lower()
    if compiler != "no":
        reporter.warn(f"the launcher's dynamo backend {compiler} is ignored")
    if _launcher_asks("FSDP_ACTIVATION_CHECKPOINTING") and not spec.gradient_checkpointing:
        reporter.warn(
            "the launcher's fsdp_activation_checkpointing is ignored: "
            "--gradient-checkpointing does that here"
        )
    # What `accelerate launch --cpu --num_processes N` leaves in the environment of the one process
    # that it starts.
    if (
        process_count() == 1
        and _launcher_asks("ACCELERATE_USE_CPU")
        and "MASTER_PORT" in os.environ
    ):
        reporter.warn(
            "this is the only process: on a CPU accelerate launch starts one, whatever number it "
            "is given; torchrun --nproc-per-node N starts N"
        )


def forget_launcher() -> None:
    """Take out of the environment what the trainer would follow past the spec.

    The model is sliced here; accelerate would slice it again.
    """
    for variable in (_FSDP, _PRECISION, _COMPILER):
        os.environ.pop(variable, None)


def _check_fsdp(spec: FitSpec) -> None:
    if process_count() == 1:
        raise UsageError(
            "--fsdp shares the model out among processes, and there is only this one",
            "torchrun --nproc-per-node N -m loram_cli ... --fsdp starts N of them",
        )
    if spec.optimizer != "adamw":
        raise UsageError(
            f"--optimizer {spec.optimizer} cannot work on the slices that --fsdp makes",
            "pass --optimizer adamw; its moments are shared out as well",
        )
    if _launcher_asks("FSDP_OFFLOAD_PARAMS"):
        raise UsageError(
            "the launcher asks for FSDP with offloading to the CPU, which loram does not do",
            "launch without --fsdp_offload_params; --quantize nf4 makes the model small",
        )


def _launcher_asks(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
