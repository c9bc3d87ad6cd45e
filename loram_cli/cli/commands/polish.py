"""``loram polish``."""

from loram_cli.cli.options import BaseStageOptions, Values, run_stage
from loram_cli.stages.train.spec import PolishSpec

NAME = "polish"
EPILOG = "Example: loram polish --steps 10"
SPEC, OPTIONS = PolishSpec, BaseStageOptions


def command(values: Values, options: BaseStageOptions) -> None:
    """Go on from the recovered adapter for a few exact steps on the full model, layer by layer.

    Settings that are not given are those of the training that the adapter comes from.
    """
    from loram_cli.stages.train import stage

    run_stage(NAME, stage, values, options, at_hand="from_adapter")
