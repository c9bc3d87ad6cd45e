"""What align and train share: how a model is fitted, checked when the spec is built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from loram_cli.errors import UsageError
from loram_cli.memory.setup import CrossEntropy, Optimizer
from loram_cli.schema import Spec, setting
from loram_cli.training.choices import Exhausted, Precision, Scheduler, Tracker

Quantization = Literal["nf4"]
Attention = Literal["auto", "sdpa", "flash", "eager"]

# Seeds of torch, numpy and Python alike.
HIGHEST_SEED = 2**32 - 1

SEED_HELP = "Seed of all random choices."
DEVICE_FORM = (r"cpu|(cuda|mps)(:\d{1,3})?", "pass cpu, cuda or cuda:1")
DEVICE_HELP = "cpu, cuda, cuda:1, ...; a GPU when there is one."
OUT_HELP = "Output directory, instead of the run's own."
FORCE_HELP = "Replace an existing output."
CHECKPOINTING_HELP = "Less memory, more time."
COMPILE_HELP = "Compile the layers: the first steps take minutes, the others less time and memory."
CROSS_ENTROPY_HELP = "chunked (never all logits at once) or full."
OPTIMIZER_HELP = "adamw, or paged_adamw_8bit (GPU only, a quarter of the state)."
RANK_HELP = "LoRA r."


@dataclass(frozen=True, kw_only=True)
class FitSpec(Spec):
    """How a model is fitted: the settings of align and train alike."""

    source: Path = setting(
        help="Model directory or hub id, not the run's own.",
        flag="--in",
        place=True,
        in_key=False,
        private=True,
    )
    out: Path = setting(help=OUT_HELP, place=True, in_key=False, private=True)
    data: str = setting(help="A file, a folder or a data set id.")
    exhausted: Exhausted = setting(
        "stop",
        help="With weighted sources: stop when the first is used up, or repeat it.",
        in_key="changed",
    )
    steps: int | None = setting(400, help="Optimizer steps.", at_least=1)
    learning_rate: float | None = setting(5e-5, help="Peak of the schedule.", above=0)
    warmup_steps: int | None = setting(20, help="Steps of linear warm-up.", at_least=0)
    lr_scheduler: Scheduler = setting(
        "cosine",
        help="cosine, linear, constant, polynomial or inverse_sqrt: the rate after warm-up.",
        in_key="changed",
    )
    weight_decay: float = setting(0.0, help="Weight decay of AdamW.", at_least=0, in_key="changed")
    max_grad_norm: float = setting(
        1.0, help="Clip gradients to this norm; 0: not at all.", at_least=0, in_key="changed"
    )
    batch: int = setting(32, help="Rows per step.", at_least=1)
    micro_batch: int = setting(4, help="Rows per forward pass.", at_least=1)
    save_steps: int = setting(50, help="Steps per checkpoint.", at_least=1)
    eval_steps: int = setting(50, help="Steps per evaluation.", at_least=1)
    gradient_checkpointing: bool = setting(False, help=CHECKPOINTING_HELP)
    cross_entropy: CrossEntropy = setting("chunked", help=CROSS_ENTROPY_HELP)
    attention: Attention = setting("auto", help="auto, sdpa, flash or eager.")
    optimizer: Optimizer = setting("adamw", help=OPTIMIZER_HELP)
    precision: Precision = setting("auto", help="auto (bf16 on a GPU that has it), fp32 or bf16.")
    report_to: tuple[Tracker, ...] = setting(
        (),
        help="Also log the losses to: tensorboard, wandb, mlflow, swanlab (comma-separated).",
        in_key=False,
        private=True,
    )
    fsdp: bool = setting(False, help="Under torchrun: share the model out (FSDP).", in_key=False)
    device: str | None = setting(
        None, help=DEVICE_HELP, form=DEVICE_FORM, in_key=False, private=True
    )
    seed: int = setting(42, help=SEED_HELP, at_least=0, at_most=HIGHEST_SEED)
    force: bool = setting(
        False, help=FORCE_HELP, place=True, switch=True, in_key=False, private=True
    )

    def check(self) -> None:
        """Refuse a batch that does not divide into micro-batches.

        Raises:
            UsageError: It does not.
        """
        if self.batch % self.micro_batch:
            raise UsageError(
                f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch}"
            )

    def steps_for(self, examples: int) -> int:
        """Optimizer steps on so much data.

        Args:
            examples: Rows to learn from, as ``batch`` counts them.
        """
        assert self.steps is not None
        return self.steps


class Trained(Protocol):
    """What says how training goes, or will go."""

    @property
    def quantize(self) -> str | None:
        """``nf4``, or None."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""

    @property
    def micro_batch(self) -> int:
        """Examples per forward pass."""


def smaller_trainings(spec: Trained) -> list[str]:
    """Flags that make a training take less memory, and that are not in use."""
    flags = ("--quantize nf4", "--gradient-checkpointing", "--micro-batch 1")
    used = (spec.quantize, spec.gradient_checkpointing, spec.micro_batch == 1)
    return [flag for flag, value in zip(flags, used, strict=True) if not value]
