"""The stages as functions: the same specs and results as the commands, for notebooks and scripts.

    from pathlib import Path
    from loram_cli import api

    run = Path("my-run")
    api.prune(api.PruneSpec(model=Path("base"), out=run / "pruned", strategy="rand", ratio=0.5))
    api.train(api.TrainSpec(source=run / "pruned", out=run / "adapter", data="train.jsonl"))
    api.recover(api.RecoverSpec(adapter=run / "adapter", model=Path("base"), out=run / "recovered"))

Importing this module imports no torch; each function imports what it needs. Mistakes raise
:class:`LoramError`, or :class:`UsageError` for a setting that cannot be. A :class:`Reporter` hears
of notes, warnings and progress; without one, a stage says nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram_cli.config.recipe import Recipe, load_recipe
from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.results import Answer
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.rundir import RunDirectory
from loram_cli.stages.align.spec import AlignSpec
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.stages.evaluate.spec import EvalSpec, GenerateSpec
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.stages.recover.spec import MergeSpec, RecoverSpec
from loram_cli.stages.train.spec import PolishSpec, TrainSpec
from loram_cli.tools.inspect import Inspection, inspect
from loram_cli.tools.specs import MemoryReportSpec, VerifyReport, VerifySpec

__all__ = [
    "AlignSpec",
    "Answer",
    "EvalSpec",
    "GenerateSpec",
    "Inspection",
    "LoramError",
    "Manifest",
    "MemoryReportSpec",
    "MergeSpec",
    "PolishSpec",
    "PruneSpec",
    "Recipe",
    "RecoverSpec",
    "Reporter",
    "RunDirectory",
    "StageResult",
    "TrainSpec",
    "UsageError",
    "VerifyReport",
    "VerifySpec",
    "align",
    "evaluate",
    "generate",
    "inspect",
    "load_model",
    "load_recipe",
    "memory_report",
    "merge",
    "polish",
    "prune",
    "recover",
    "run_recipe",
    "train",
    "verify",
]


def prune(spec: PruneSpec, reporter: Reporter | None = None) -> StageResult:
    """Prune a base, as ``loram prune``."""
    from loram_cli.stages.prune.stage import run

    return run(spec, reporter or NullReporter())


def align(spec: AlignSpec, reporter: Reporter | None = None) -> StageResult:
    """Align a pruned model, as ``loram align``."""
    from loram_cli.stages.align.stage import run

    return run(spec, reporter or NullReporter())


def train(spec: TrainSpec, reporter: Reporter | None = None) -> StageResult:
    """Train a LoRA adapter, as ``loram train``."""
    from loram_cli.stages.train.stage import run

    return run(spec, reporter or NullReporter())


def recover(spec: RecoverSpec, reporter: Reporter | None = None) -> StageResult:
    """Bring an adapter to the base's shapes, as ``loram recover``."""
    from loram_cli.stages.recover.stage import run

    return run(spec, reporter or NullReporter())


def merge(spec: MergeSpec, reporter: Reporter | None = None) -> StageResult:
    """Write base and adapter as one checkpoint, as ``loram recover --merge``."""
    from loram_cli.stages.recover.merge import run

    return run(spec, reporter or NullReporter())


def polish(spec: PolishSpec, reporter: Reporter | None = None) -> StageResult:
    """Go on from a recovered adapter on the base itself, as ``loram polish``."""
    from loram_cli.stages.train.stage import run

    return run(spec, reporter or NullReporter())


def evaluate(spec: EvalSpec, reporter: Reporter | None = None) -> StageResult:
    """Score models on the same tasks, as ``loram eval``."""
    from loram_cli.stages.evaluate.stage import run

    return run(spec, reporter or NullReporter())


def generate(spec: GenerateSpec, reporter: Reporter | None = None) -> list[Answer]:
    """Ask models, as ``loram generate``; what does not fit the device is read as it runs."""
    from loram_cli.stages.evaluate.generate import run

    return run(spec, reporter or NullReporter())


def memory_report(spec: MemoryReportSpec, reporter: Reporter | None = None) -> Mapping[str, Any]:
    """Parameters and memory by arithmetic, as ``loram memory-report --json``."""
    from loram_cli.tools.memory_report import run

    return run(spec, reporter or NullReporter()).to_mapping()


def verify(spec: VerifySpec, reporter: Reporter | None = None) -> VerifyReport:
    """Check a directory against what was recorded, as ``loram verify``."""
    from loram_cli.tools.verify import run

    return run(spec, reporter or NullReporter())


def run_recipe(
    recipe: Recipe, run: Path, *, force: bool = False, reporter: Reporter | None = None
) -> list[StageResult]:
    """Run every stage of a recipe into a run directory, as ``loram run``."""
    from loram_cli.pipeline import run as run_all

    return run_all(
        recipe,
        RunDirectory(run),
        force=force,
        reporter=reporter or NullReporter(),
        on_result=lambda result: None,
    )


def load_model(directory: Path, **options: Any) -> Any:
    """A base, pruned, aligned or merged directory as a Hugging Face causal LM.

    Args:
        directory: With ``config.json`` and safetensors.
        options: See :func:`loram_cli.modeling.load.load_causal_lm`.
    """
    from loram_cli.modeling.load import load_causal_lm

    return load_causal_lm(directory, **options)
