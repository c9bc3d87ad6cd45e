"""How an adapter is fitted, from the settings of train."""

from dataclasses import replace

from loram_cli.stages.fit.run import fit_options
from loram_cli.stages.train.settings import TrainSettings
from loram_cli.training.loop.options import FitOptions


def train_options(spec: TrainSettings, examples: int) -> FitOptions:
    """The spec's share that says how to fit.

    Args:
        spec: Settled.
        examples: Rows to learn from, as ``batch`` counts them.
    """
    return replace(
        fit_options(spec, examples),
        packing=spec.packing if spec.objective == "sft" else "off",
        compile_layers=spec.compile,
        early_stopping=spec.early_stopping,
        keep_checkpoints=spec.keep_checkpoints,
    )
