"""What alignment may be told, whatever its methods."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loram_cli.schema import Bytes, redefined, setting
from loram_cli.stages.fit.spec import FitSpec
from loram_cli.units import GIB

Trained = Literal["all", "norms", "lora"]


@dataclass(frozen=True, kw_only=True)
class AlignSettings(FitSpec):
    """The settings of align; the rate is the reference code's."""

    source: Path = redefined(FitSpec, "source", help="Pruned directory, not the run's.")
    steps: int = redefined(FitSpec, "steps")
    learning_rate: float = redefined(FitSpec, "learning_rate")
    warmup_steps: int = redefined(FitSpec, "warmup_steps")
    data: str = redefined(FitSpec, "data", help="Text: .txt, .jsonl, a folder, a data set id.")
    method: tuple[str, ...] = setting(
        ("pretrain",),
        help="reconstruct (fits each layer in closed form), distill (learns the full model's "
        "logits), pretrain (the paper's), or several by commas, in their order.",
    )
    model: Path | None = setting(
        None,
        help="The full model, for reconstruct and distill; else where prune found it.",
        place=True,
        in_key=False,
        private=True,
    )
    block_length: int = setting(512, help="Tokens per packed row.", at_least=2)
    eval_rows: int = setting(32, help="Packed rows held out.", at_least=0)
    calibration_samples: int = setting(128, help="reconstruct: windows of text.", at_least=1)
    calibration_memory: Bytes = setting(
        Bytes(4 * GIB),
        help="reconstruct: memory for activations; the rest goes to disk.",
        at_least=0,
        in_key=False,
    )
    ridge: float = setting(
        0.01,
        help="reconstruct: pull of the pruned weights, as a share of the inputs' power.",
        at_least=0,
    )
    targets: Literal["full", "local"] = setting(
        "full",
        help="reconstruct: the full layers run on the full model's hidden states, or (local) on "
        "the pruned one's.",
    )
    block_steps: int = setting(
        0, help="reconstruct: gradient steps on each layer after its closed form.", at_least=0
    )
    expert_steps: int = setting(
        64,
        help="reconstruct: gradient steps on router and experts of each layer that lost experts, "
        "where --block-steps is 0.",
        at_least=0,
        in_key="changed",
    )
    block_learning_rate: float = setting(
        1e-3, help="reconstruct: their rate, falling linearly.", above=0
    )
    distill_temperature: float = setting(1.0, help="distill: softens both distributions.", above=0)
    trained: Trained = setting(
        "all",
        help="distill and pretrain: train all weights, norms and biases alone, or LoRA factors on "
        "the linears, which are then merged.",
        in_key="changed",
    )
    rank: int = setting(16, help="--trained lora: LoRA r.", at_least=1, in_key="changed")
    train_lm_head: bool = setting(
        False, help="Train the output head too; the reference code freezes it."
    )
