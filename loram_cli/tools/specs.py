"""What the tools are asked: a memory report, a measurement, a verification."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loram_cli.arch.registry import family_for
from loram_cli.errors import UsageError
from loram_cli.memory.presets import load_preset
from loram_cli.memory.setup import CrossEntropy, Optimizer, Packing
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.pruning.strategies import STRATEGIES, strategy_named
from loram_cli.pruning.strategy import Strategy
from loram_cli.schema import Bytes, Spec, setting
from loram_cli.stages.fit.spec import (
    CHECKPOINTING_HELP,
    COMPILE_HELP,
    CROSS_ENTROPY_HELP,
    DEVICE_FORM,
    DEVICE_HELP,
    HIGHEST_SEED,
    OPTIMIZER_HELP,
    RANK_HELP,
    SEED_HELP,
    Attention,
    Quantization,
)

# Without a GPU a preset would take hours; this one takes seconds, and says nothing about a preset.
TINY_NAME = "tiny"
TINY_CONFIG = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_KEEP_FIRST, _KEEP_LAST = 4, 2
_HOW = re.compile(r"(?P<ratio>\d+\.?\d*|\.\d+)?(:(?P<nf4>nf4))?(:x(?P<multiple>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True, kw_only=True)
class StepSpec(Spec):
    """One training step, whose memory is predicted or measured."""

    rank: int = setting(8, help=RANK_HELP, at_least=1)
    dropout: float = setting(0.05, help="LoRA dropout.", at_least=0, below=1)
    micro_batch: int = setting(4, help="Sequences per forward pass.", at_least=1)
    length: int = setting(512, help="Tokens per sequence.", at_least=1)
    gradient_checkpointing: bool = setting(False, help=CHECKPOINTING_HELP)
    cross_entropy: CrossEntropy = setting("chunked", help=CROSS_ENTROPY_HELP)
    optimizer: Optimizer = setting("adamw", help=OPTIMIZER_HELP)


@dataclass(frozen=True, kw_only=True)
class MemoryReportSpec(StepSpec):
    """What to report on."""

    model: Path | None = setting(
        None, help="The base's directory, or its config.json.", flag="", place=True
    )
    preset: str | None = setting(
        None, help="A published model's shapes, such as llama2-70b or qwen3-8b (docs: presets)."
    )
    pruned: Path | None = setting(
        None, help="A pruned directory of that base.", flag="", place=True
    )
    ratios: tuple[float, ...] = setting(
        (),
        flag="--ratio",
        help="Pruning ratio; may be repeated.",
        default_text="the paper's",
        repeat=True,
        above=0,
        below=1,
    )
    experts_ratios: tuple[float, ...] = setting(
        (),
        flag="--experts-ratio",
        help="Share of experts to drop in every layer that has them; may be repeated.",
        repeat=True,
        above=0,
        below=1,
    )
    strategy: str = setting("stru", help=f"{', '.join(STRATEGIES)}.", choices=lambda: STRATEGIES)
    keep_first: int = setting(4, help="First layers kept whole.", at_least=0)
    keep_last: int = setting(2, help="Last layers kept whole.", at_least=0)
    multiple_of: int = setting(
        1, help="Round kept MLP channels up to a multiple: 64 suits GPUs.", at_least=1
    )
    targets: tuple[str, ...] = setting(
        (), help="Modules that get factors, comma-separated.", default_text="all"
    )
    attention: Attention = setting("auto", help="auto, sdpa, flash or eager.")
    processes: int = setting(
        1,
        help="Share the model out among so many (train --fsdp): what each one holds.",
        at_least=1,
    )
    data: str | None = setting(
        None,
        help="Instructions, as train takes them: a pass counts the real tokens of the longest, and "
        "not --length of each. Needs the model's tokenizer.",
    )
    packing: Packing = setting("auto", help="With --data: auto, on or off, as train has it.")
    fit_bytes: Bytes | None = setting(
        None,
        flag="--fit",
        help="All ways to train that fit so much memory, e.g. 24GiB, fastest first.",
        at_least=1,
    )
    cards: bool = setting(
        False, switch=True, help="Only tell the ways to train on each of the common cards."
    )
    batches: tuple[int, ...] = setting(
        (8, 32, 128),
        flag="--batch",
        help="Examples per step, layer by layer (train --stream); may be repeated. --fit and "
        "--cards take the largest.",
        repeat=True,
        at_least=1,
    )
    bus: float = setting(
        25.0, help="GB/s from RAM to the GPU: PCIe 4.0 x16 gives 25, 5.0 50.", above=0
    )
    disk: float = setting(3.0, help="GB/s from the disk.", above=0)
    tflops: float = setting(
        60.0, help="TFLOP/s that training reaches: RTX 3090 40, 4090 100, H100 400.", above=0
    )
    layer_ms: float = setting(
        6.0,
        help="Milliseconds to start a layer's kernels, forward and back: 6 beside an H100.",
        at_least=0,
    )

    def check(self) -> None:
        """Refuse two models, or settings that do not go together.

        Raises:
            UsageError: See above.
        """
        if (self.model is None) == (self.preset is None):
            raise UsageError(
                "memory-report needs a model directory or a preset, and not both",
                "pass --model DIR, or --preset llama2-70b",
            )
        if self.data is not None and (self.model is None or self.model.is_file()):
            raise UsageError(
                "--data needs a tokenizer, which a preset or a single config does not have",
                "pass --model DIR, or --length",
            )
        only = self.chosen_strategy.only_ratio
        for ratio in self.ratios:
            if only is not None and ratio != only:
                raise UsageError(
                    f"--strategy {self.strategy} with --ratio {ratio}: 2:4 zeroes two of every "
                    "four weights",
                    f"pass --ratio {only:g}, or none",
                )
        if self.ratios and self.chosen_strategy.rounds:
            raise UsageError(
                f"--ratio does not go with --strategy {self.strategy}: it drops and zeroes nothing",
                "leave it out: the report has a row for 4, 3 and 2 bits",
            )
        if self.multiple_of > 1 and self.chosen_strategy.keep is None:
            raise UsageError(f"--multiple-of does not go with --strategy {self.strategy}")
        if self.processes > 1 and self.optimizer != "adamw":
            raise UsageError(
                f"--optimizer {self.optimizer} cannot work on the slices that --fsdp makes",
                "pass --optimizer adamw; its moments are shared out as well",
            )

    @property
    def chosen_strategy(self) -> Strategy:
        """The strategy's own file."""
        return strategy_named(self.strategy)

    @property
    def effective_ratios(self) -> tuple[float, ...]:
        """The ratios to work out: those of the paper, or none where a directory is given."""
        if self.ratios or self.experts_ratios or self.pruned is not None:
            return self.ratios
        return self.chosen_strategy.paper_ratios


@dataclass(frozen=True, kw_only=True)
class BenchSpec(StepSpec):
    """What to measure."""

    rows: tuple[str, ...] = setting(
        flag="--row",
        help="PRESET[:RATIO[:nf4][:xN]], xN: --multiple-of; may be repeated.",
        repeat=True,
    )
    steps: int = setting(8, help="Timed steps.", at_least=1)
    compile: bool = setting(False, help=COMPILE_HELP)
    attention: Literal["sdpa", "flash", "eager"] = setting("sdpa", help="sdpa, flash or eager.")
    device: str | None = setting(None, help=DEVICE_HELP, form=DEVICE_FORM)
    seed: int = setting(0, help=SEED_HELP, at_least=0, at_most=HIGHEST_SEED)

    def check(self) -> None:
        """Refuse rows that name no model.

        Raises:
            UsageError: See above.
        """
        if not self.rows:
            raise UsageError("bench needs a model", "pass --row llama2-13b:0.65, or --paper")
        for row in self.rows:
            BenchModel.parse(row)


@dataclass(frozen=True)
class BenchModel:
    """A model to measure: a preset, how it is pruned, and the precision of its weights."""

    preset: str
    ratio: float = 0.0
    quantize: Quantization | None = None
    multiple_of: int = 1

    @classmethod
    def parse(cls, row: str) -> "BenchModel":
        """Read ``PRESET[:RATIO[:nf4][:xN]]``.

        Raises:
            UsageError: It is not of that form, or there is no such preset.
        """
        preset, _, rest = row.partition(":")
        if preset != TINY_NAME:
            load_preset(preset, f"--row {row}")
        match = _HOW.fullmatch(rest)
        if match is None:
            raise UsageError(
                f"--row {row}: expected PRESET[:RATIO[:nf4][:xN]]", "such as llama2-13b:0.65:x64"
            )
        ratio = float(match["ratio"] or 0)
        if not 0 <= ratio < 1:
            raise UsageError(f"--row {row}: the ratio {ratio:g} is outside [0, 1)")
        multiple_of = int(match["multiple"] or 1)
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
        config = TINY_CONFIG if self.preset == TINY_NAME else load_preset(self.preset)
        if not self.ratio:
            return dict(config)
        geometry = family_for(config, self.preset).geometry(config)
        widths = layer_widths(geometry, self.ratio, _KEEP_FIRST, _KEEP_LAST, self.multiple_of)
        return pruned_config(config, geometry, widths)


@dataclass(frozen=True, kw_only=True)
class VerifySpec(Spec):
    """What to verify."""

    directory: Path = setting(
        help="An output, a run directory, a model or an adapter.", argument=True
    )
    values: bool = setting(False, switch=True, help="Also read every weight: no NaN, no infinity.")
    full: bool = setting(
        False, switch=True, help="Also compare every byte of the base, where they were recorded."
    )
    ancestry: bool = setting(True, help="Follow inputs to the directories that they name.")
    engine: Literal["vllm"] | None = setting(
        None, flag="--for", help="vllm: also check what its LoRA loader demands, from its rules."
    )


@dataclass(frozen=True)
class VerifyReport:
    """What was found.

    Attributes:
        directories: Every directory that was checked, the named one first.
        problems: One line each, naming the file.
        notes: What could not be checked, and why.
    """

    directories: tuple[Path, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        return {
            "directories": [str(path) for path in self.directories],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }
