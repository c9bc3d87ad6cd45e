"""The spec of every stage, by the stage's name."""

from loram_cli.schema import Spec
from loram_cli.stages.align.spec import AlignSpec
from loram_cli.stages.evaluate.spec import EvalSpec
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.stages.recover.spec import MergeSpec, RecoverSpec
from loram_cli.stages.train.spec import PolishSpec, TrainSpec

SPECS: dict[str, type[Spec]] = {
    "prune": PruneSpec,
    "align": AlignSpec,
    "train": TrainSpec,
    "recover": RecoverSpec,
    "merge": MergeSpec,
    "polish": PolishSpec,
    "eval": EvalSpec,
}
