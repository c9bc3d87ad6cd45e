"""``loram prune``."""

from loram_cli.cli.options import BaseStageOptions, Values, run_stage
from loram_cli.stages.prune.spec import PruneSpec

NAME = "prune"
EPILOG = "Example: loram prune --model ./Llama-2-13b-hf --ratio 0.65 --calibration text.jsonl"
SPEC, OPTIONS = PruneSpec, BaseStageOptions


def command(values: Values, options: BaseStageOptions) -> None:
    """Drop whole attention groups and MLP channels, or zero single weights, once, offline."""
    from loram_cli.stages.prune import stage

    run_stage(NAME, stage, values, options)
