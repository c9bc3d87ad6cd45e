"""``loram align``."""

from loram_cli.cli.options import StageOptions, Values, run_stage
from loram_cli.stages.align.spec import AlignSpec

NAME = "align"
EPILOG = "Example: loram align --data fineweb-sample.jsonl --steps 400"
SPEC, OPTIONS = AlignSpec, StageOptions


def command(values: Values, options: StageOptions) -> None:
    """Bring the pruned model back towards the full one, so that its updates fit it."""
    from loram_cli.stages.align import stage

    run_stage(NAME, stage, values, options, at_hand="source")
