"""``loram train``."""

from loram_cli.cli.options import StageOptions, Values, run_stage
from loram_cli.stages.train.spec import TrainSpec

NAME = "train"
EPILOG = "Example: loram train --data instructions.jsonl --quantize nf4"
SPEC, OPTIONS = TrainSpec, StageOptions


def command(values: Values, options: StageOptions) -> None:
    """Fit LoRA on the small model (QLoRAM with --quantize nf4), by SFT, DPO or GRPO."""
    from loram_cli.stages.train import stage

    run_stage(NAME, stage, values, options, at_hand=values.get("source"))
