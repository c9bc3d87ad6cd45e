"""``loram train``."""

from dataclasses import dataclass
from typing import Literal

from loram_cli.cli.options import StageOptions, Values, run_stage
from loram_cli.errors import UsageError
from loram_cli.schema import setting
from loram_cli.stages.train.spec import TrainSpec

NAME = "train"
EPILOG = "Example: loram train --data instructions.jsonl --quantize nf4"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(StageOptions):
    """Of ``train``."""

    on: Literal["small", "full"] = setting(
        "small", help="small (the run's aligned or pruned model) or full (its base)."
    )


SPEC, OPTIONS = TrainSpec, TrainOptions


def command(values: Values, options: TrainOptions) -> None:
    """Fit LoRA on the small model (QLoRAM with --quantize nf4), by SFT, DPO, ORPO, KTO or GRPO."""
    from loram_cli.config.defaults import FILL
    from loram_cli.stages.train import stage

    source = values.get("source")
    if options.on == "full" and source is not None:
        raise UsageError(
            f"--on full is the run's base, and --in {source} names another model",
            "pass one of the two",
        )
    fill = FILL["full_lora"] if options.on == "full" else None
    run_stage(NAME, stage, values, options, at_hand="source", fill=fill)
