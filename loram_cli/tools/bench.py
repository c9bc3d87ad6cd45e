"""Bench: real training steps on random weights of a model's true shapes, beside the prediction."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import Reporter
from loram_cli.schema import spec_to_mapping

# Table 8 of the paper, the last of it also in widths that suit a GPU, and its 70B models in NF4.
PAPER_ROWS = (
    "llama2-7b", "llama2-13b", "llama2-13b:0.65", "llama2-13b:0.65:x64",
    "llama2-70b:0.85:nf4", "llama2-70b:0.95:nf4",
)  # fmt: skip

# Without a GPU a preset would take hours; this one takes seconds, and says nothing about a preset.
TINY_NAME = "tiny"
TINY_CONFIG = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_KEEP_FIRST, _KEEP_LAST = 4, 2
_HOW = re.compile(r"(?P<ratio>\d+\.?\d*|\.\d+)?(:(?P<nf4>nf4))?(:x(?P<multiple_of>[1-9][0-9]*))?")

# The measuring process ends so where it says in plain words what is wrong.
REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What to measure.

    Attributes:
        rows: Models: ``PRESET[:RATIO[:nf4][:xN]]``; ratio 0 is the base, N what the kept channels
            are a multiple of.
        micro_batch: Sequences per pass, and per optimizer step.
        length: Tokens per sequence; every one of them carries loss.
        steps: Optimizer steps that are timed.
        rank: LoRA r.
        dropout: LoRA dropout.
        gradient_checkpointing: Keep layers' inputs alone.
        cross_entropy: ``chunked`` or ``full``.
        attention: ``sdpa``, ``flash`` or ``eager``.
        optimizer: ``adamw`` or ``paged_adamw_8bit``.
        device: ``cuda``, ``cpu``, ...; None takes a GPU when there is one.
        seed: Of weights and tokens.
    """

    rows: tuple[str, ...]
    micro_batch: int = 4
    length: int = 512
    steps: int = 8
    rank: int = 8
    dropout: float = 0.05
    gradient_checkpointing: bool = False
    cross_entropy: Literal["full", "chunked"] = "chunked"
    attention: Literal["sdpa", "flash", "eager"] = "sdpa"
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rows:
            raise UsageError("bench needs a model", "pass --row llama2-13b:0.65, or --paper")
        for name in ("micro_batch", "length", "steps", "rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout} is outside [0, 1)")
        for row in self.rows:
            BenchModel.parse(row)


@dataclass(frozen=True)
class BenchModel:
    """A model to measure: a preset, how it is pruned, and the precision of its weights."""

    preset: str
    ratio: float = 0.0
    quantize: Literal["nf4"] | None = None
    multiple_of: int = 1

    @classmethod
    def parse(cls, row: str) -> "BenchModel":
        """Read ``PRESET[:RATIO[:nf4][:xN]]``.

        Raises:
            UsageError: It is not of that form, or there is no such preset.
        """
        from loram_cli.memory.presets import load_preset

        preset, _, rest = row.partition(":")
        if preset != TINY_NAME:
            load_preset(preset, f"--row {row}")
        match = _HOW.fullmatch(rest)
        if match is None:
            raise UsageError(
                f"--row {row}: PRESET[:RATIO[:nf4][:xN]] is wanted", "such as llama2-13b:0.65:x64"
            )
        ratio = float(match["ratio"] or 0)
        if not 0 <= ratio < 1:
            raise UsageError(f"--row {row}: the ratio {ratio:g} is outside [0, 1)")
        multiple_of = int(match["multiple_of"] or 1)
        if multiple_of > 1 and not ratio:
            raise UsageError(f"--row {row}: x{multiple_of} is for a ratio above 0")
        return cls(preset, ratio, "nf4" if match["nf4"] else None, multiple_of)

    def __str__(self) -> str:
        multiple = f":x{self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.preset}:{self.ratio:f}" + (":nf4" if self.quantize else "") + multiple

    @property
    def label(self) -> str:
        """Such as ``llama2-70b QLoRAM 0.85 x64``."""
        quantized = "Q" if self.quantize else ""
        ratio = f" {self.ratio:g}" if self.ratio else ""
        multiple = f" x{self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.preset} {quantized}LoRA{'M' if self.ratio else ''}{ratio}{multiple}"

    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        from loram_cli.arch.registry import family_for
        from loram_cli.memory.presets import load_preset
        from loram_cli.pruning.plan import layer_widths, pruned_config

        config = TINY_CONFIG if self.preset == TINY_NAME else load_preset(self.preset)
        if not self.ratio:
            return dict(config)
        geometry = family_for(config, self.preset).geometry(config)
        widths = layer_widths(geometry, self.ratio, _KEEP_FIRST, _KEEP_LAST, self.multiple_of)
        return pruned_config(config, geometry, widths)


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
    from loram_cli.modeling.load import usable_device
    from loram_cli.stages.fit.run import check_optimizer

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
    """The rows, each compared with LoRA on the whole base of the same preset.

    Args:
        rows: As measured.
    """
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
