"""The process that measures one row of a bench: spec in on stdin, result out on stdout, as JSON."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal

from loram_cli.memory.setup import TrainingSetup
from loram_cli.tools.bench import REFUSED, BenchRow
from loram_cli.tools.specs import BenchModel, BenchSpec

# Steps before the clock starts: kernels are chosen and memory pools grow.
_WARM_STEPS = 2


def main() -> None:
    """Measure the row."""
    from loram_cli.errors import LoramError
    from loram_cli.schema import spec_from_mapping

    spec = spec_from_mapping(BenchSpec, json.load(sys.stdin), "bench")
    try:
        row = measure(spec)
    except LoramError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(REFUSED)
    sys.stdout.write("\n" + json.dumps(asdict(row)) + "\n")


def measure(spec: BenchSpec) -> BenchRow:
    """Measure the only row of a spec in this very process, which should have done nothing else."""
    import peft  # noqa: F401 - imported here so that its memory is not charged to training
    import torch

    from loram_cli.arch.registry import family_for
    from loram_cli.memory.account import count_params
    from loram_cli.memory.training import training_memory
    from loram_cli.runs.meter import Meter
    from loram_cli.training.loop.options import resolve_precision

    model = BenchModel.parse(spec.rows[0])
    config = model.config()
    family = family_for(config, model.preset)
    assert spec.device is not None
    precision = resolve_precision("auto", spec.device)
    setup = _setup(spec, model, precision)
    on_gpu = spec.device.startswith("cuda")
    row = BenchRow(
        row=spec.rows[0],
        label=model.label,
        device=torch.cuda.get_device_name(spec.device) if on_gpu else "cpu",
        params=count_params(family, config).total,
        predicted_bytes=training_memory(family, config, setup).allocated,
    )
    if on_gpu:
        torch.cuda.init()
    meter = Meter()
    try:
        seconds = _train(spec, config, setup)
    except torch.cuda.OutOfMemoryError:
        return replace(row, failure="out of memory")
    peak = meter.stop()
    measured = peak.peak_memory_bytes if on_gpu else peak.peak_memory_increase_bytes
    timed = sorted(seconds[_WARM_STEPS:])
    median = timed[len(timed) // 2]
    return replace(
        row,
        measured_bytes=measured,
        reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else 0,
        deviation=measured / row.predicted_bytes - 1 if on_gpu else None,
        seconds_per_step=median,
        samples_per_second=spec.micro_batch / median,
    )


def _train(spec: BenchSpec, config: dict[str, Any], setup: TrainingSetup) -> list[float]:
    """Seconds of each optimizer step; the path is that of ``loram train``."""
    import tempfile
    from pathlib import Path

    import numpy as np
    import torch

    from loram_cli.arch.registry import family_for
    from loram_cli.arch.targets import lora_targets
    from loram_cli.modeling.random_model import random_causal_lm
    from loram_cli.training.adapters import attach_lora, lora_config
    from loram_cli.training.data.tokens import TokenRow
    from loram_cli.training.loop.loop import fit_lora
    from loram_cli.training.loop.options import FitOptions

    family = family_for(config, "bench")
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    model = random_causal_lm(
        family,
        config,
        dtype=dtype,
        device=str(spec.device),
        attention=spec.attention,
        nf4=setup.quantize == "nf4",
        seed=spec.seed,
    )
    tied = family.geometry(config).tied_embeddings
    targets = lora_targets(family, tied_embeddings=tied)
    lora = lora_config(targets, rank=spec.rank, dropout=spec.dropout)
    model = attach_lora(model, lora, seed=spec.seed).train()
    steps = spec.steps + _WARM_STEPS
    rng = np.random.default_rng(spec.seed)
    rows = [
        TokenRow(rng.integers(3, config["vocab_size"], spec.length, dtype=np.int32))
        for _ in range(steps * spec.micro_batch)
    ]
    options = FitOptions(
        learning_rate=1e-5,
        steps=steps,
        batch=spec.micro_batch,
        micro_batch=spec.micro_batch,
        warmup_steps=0,
        checkpoint_steps=steps + 1,
        precision=setup.precision,
        gradient_checkpointing=spec.gradient_checkpointing,
        compile_layers=spec.compile,
        cross_entropy=spec.cross_entropy,
        optimizer=spec.optimizer,
        seed=spec.seed,
    )
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as folder:
        fit_lora(model, rows, [], options, Path(folder), clock)
    return clock.seconds()


def _setup(spec: BenchSpec, model: BenchModel, precision: Literal["fp32", "bf16"]) -> TrainingSetup:
    return TrainingSetup(
        rank=spec.rank,
        dropout=spec.dropout,
        quantize=model.quantize,
        micro_batch=spec.micro_batch,
        length=spec.length,
        gradient_checkpointing=spec.gradient_checkpointing,
        attention=spec.attention,
        cross_entropy=spec.cross_entropy,
        optimizer=spec.optimizer,
        precision=precision,
        padded=False,
        device="cpu" if spec.device == "cpu" else "cuda",
    )


class _StepClock:
    """A reporter that notes when each step was done, and says nothing."""

    def __init__(self) -> None:
        self._times = [time.monotonic()]

    def note(self, line: str) -> None:
        """Drop the note."""

    def warn(self, line: str) -> None:
        """Drop the warning."""

    @contextmanager
    def progress(self, label: str, total: float | None, unit: str = "it") -> Iterator[Any]:
        """Count from here."""
        yield self

    def advance(self, steps: float = 1) -> None:
        """One more step is done."""
        self._times.append(time.monotonic())

    def skip(self, steps: float) -> None:
        """No step here."""

    def detail(self, text: str) -> None:
        """Nothing to draw."""

    def seconds(self) -> list[float]:
        """Length of every step."""
        return [b - a for a, b in zip(self._times, self._times[1:], strict=False)]


if __name__ == "__main__":
    main()
