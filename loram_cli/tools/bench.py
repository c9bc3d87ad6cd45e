"""Bench: real training steps on random weights of a model's true shapes, beside the prediction."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.modeling.load import usable_device
from loram_cli.reporting import Reporter
from loram_cli.schema import spec_to_mapping
from loram_cli.stages.fit.run import check_optimizer
from loram_cli.tools.specs import TINY_NAME, BenchModel, BenchSpec

# Table 8 of the paper, the last of it also in widths that suit a GPU, and its 70B models in NF4.
PAPER_ROWS = (
    "llama2-7b", "llama2-13b", "llama2-13b:0.65", "llama2-13b:0.65:x64",
    "llama2-70b:0.85:nf4", "llama2-70b:0.95:nf4",
)  # fmt: skip

# The measuring process ends so where it says in plain words what is wrong.
REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """What was predicted and what was measured.

    Attributes:
        row: As it was asked for.
        label: The model in words.
        device: The card's name, or ``cpu``.
        params: Parameters of the model.
        predicted_bytes: By arithmetic: allocated on a GPU, without the context.
        measured_bytes: The allocator's highest mark on a GPU; on a CPU the growth of resident
            memory, which holds much that is not the model. None where it failed.
        reserved_bytes: What the allocator took from the device; 0 on a CPU.
        deviation: Measured over predicted, less 1; None on a CPU, where the two do not compare.
        seconds_per_step: Median over the timed steps.
        samples_per_second: Micro-batch over that.
        speedup: Samples per second over those of LoRA on the same preset in bf16; None where the
            run had no such row.
        failure: Why there is no figure, or None.
    """

    row: str
    label: str
    device: str
    params: int
    predicted_bytes: int
    measured_bytes: int | None = None
    reserved_bytes: int = 0
    deviation: float | None = None
    seconds_per_step: float | None = None
    samples_per_second: float | None = None
    speedup: float | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All rows, and what to know about them."""

    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        return {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}


def run(spec: BenchSpec, reporter: Reporter) -> BenchResult:
    """Measure every row in a process of its own.

    Raises:
        LoramError: A library is absent.
        UsageError: There is no such device, or the optimizer needs a GPU.
    """
    device = usable_device(spec.device)
    check_optimizer(spec.optimizer, device)
    notes = []
    if device == "cpu":
        tiny = [replace(BenchModel.parse(row), preset=TINY_NAME) for row in spec.rows]
        spec = replace(spec, rows=tuple(dict.fromkeys(str(model) for model in tiny)))
        notes.append(
            "no GPU here: these figures are of a tiny model on the CPU, where resident memory "
            "holds libraries and threads too; they say nothing about the presets"
        )
    rows = []
    with reporter.progress("bench", len(spec.rows), "model") as progress:
        for row in spec.rows:
            progress.detail(BenchModel.parse(row).label)
            rows.append(_in_a_process(replace(spec, rows=(row,), device=device)))
            progress.advance()
    return BenchResult(rows=with_speedups(rows), notes=tuple(notes))


def with_speedups(rows: Sequence[BenchRow]) -> tuple[BenchRow, ...]:
    """The rows, each compared with LoRA on the whole base of the same preset."""
    models = [BenchModel.parse(row.row) for row in rows]
    base = {
        model.preset: row.samples_per_second
        for model, row in zip(models, rows, strict=True)
        if not model.ratio and not model.quantize and row.samples_per_second
    }
    return tuple(
        replace(row, speedup=row.samples_per_second / base[model.preset])
        if row.samples_per_second and model.preset in base
        else row
        for model, row in zip(models, rows, strict=True)
    )


def _in_a_process(spec: BenchSpec) -> BenchRow:
    words = [sys.executable, "-m", "loram_cli.tools.bench_worker"]
    done = subprocess.run(
        words, input=json.dumps(spec_to_mapping(spec)), capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return BenchRow(**json.loads(done.stdout.splitlines()[-1]))
    label = BenchModel.parse(spec.rows[0]).label
    if done.returncode == REFUSED:
        reason, _, hint = done.stderr.strip().partition("\n")
        raise LoramError(f"{label}: {reason}", hint or None)
    said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    raise LoramError(f"{label}: the measuring process failed: {said}")
