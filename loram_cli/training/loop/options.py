"""How a training run goes, and what it gives back."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loram_cli.memory.setup import CrossEntropy, Optimizer, Packing
from loram_cli.training.choices import Precision, Scheduler, Tracker

Split = Literal["train", "eval", "recovered"]

# Losses on pairs of answers.
PairLoss = Literal["dpo", "orpo"]
# What preference and policy training tell beside the loss, by their names in TRL's log.
FIGURES = {
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "reward": "reward",
    "kl": "kl",
    "completions/mean_length": "completion_tokens",
}


# Of a CPU, as torch names it; and parameters from which these decide how long a step takes.
_MATRIX_UNITS = "amx_bf16"
_LARGE_PARAMS = 50_000_000
_ONE_REWARD = re.compile(r"rewards/(?P<name>\w+)/mean")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Settings shared by alignment and LoRA training; whoever builds them has checked them.

    Attributes:
        learning_rate: Peak, after warm-up.
        steps: Optimizer steps.
        batch: Sequences per optimizer step.
        micro_batch: Sequences in memory at a time; divides ``batch``.
        warmup_steps: Steps over which the rate rises from 0.
        lr_scheduler: How the rate falls from its peak.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are scaled down to this norm at most; 0 leaves them.
        packing: Whether examples share rows, see :mod:`loram_cli.training.data.packing`.
        optimizer: ``adamw``, or ``paged_adamw_8bit`` of bitsandbytes, which keeps a quarter of
            the optimizer state.
        precision: Of the computation; see :func:`resolve_precision`.
        gradient_checkpointing: Recompute activations instead of keeping them.
        compile_layers: Run decoder layers compiled, see :mod:`.compiled`.
        cross_entropy: ``chunked`` never holds all logits, ``full`` is transformers' own loss.
        checkpoint_steps: Write a checkpoint every so many steps.
        eval_steps: Evaluate every so many steps, besides start and end; None for these two only.
        seed: Decides data order and dropout.
        report_to: Trackers that get the losses as well.
        early_stopping: Stop after so many evaluations in a row without a new best one; None goes
            on to the last step.
        keep_checkpoints: How many adapters of checkpoints are kept beside the best one, the newest
            ones; None keeps none, nor the best.
    """

    learning_rate: float
    steps: int
    batch: int = 128
    micro_batch: int = 4
    warmup_steps: int = 100
    lr_scheduler: Scheduler = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    packing: Packing = "off"
    optimizer: Optimizer = "adamw"
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    cross_entropy: CrossEntropy = "chunked"
    checkpoint_steps: int = 100
    eval_steps: int | None = None
    seed: int = 0
    report_to: tuple[Tracker, ...] = ()
    early_stopping: int | None = None
    keep_checkpoints: int | None = None


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """How preferences are learnt.

    Attributes:
        beta: How much the distance to the reference costs (DPO: arXiv 2305.18290, equation 7;
            GRPO: arXiv 2402.03300, equation 3, where 0 needs no reference).
        keeps_reference: The reference is a frozen copy of the adapter as it is at the start; else
            the adapter switched off, which is the same for a fresh one and takes no memory.
    """

    beta: float
    keeps_reference: bool


@dataclass(frozen=True, kw_only=True)
class JudgedOptions(PreferenceOptions):
    """How judged answers are learnt (KTO: arXiv 2402.01306, equation 7).

    Attributes:
        good_weight: Of each good answer's loss.
        bad_weight: Of each bad one's.
    """

    good_weight: float = 1.0
    bad_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RewardOptions(PreferenceOptions):
    """How rewards are learnt.

    Attributes:
        generations: Completions per question, whose mean reward is the baseline.
        max_completion_length: Tokens of a completion.
        temperature: Completions are drawn at it.
        reward_weights: Of each reward in their sum; None for 1 each.
    """

    generations: int
    max_completion_length: int
    temperature: float
    reward_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LossRow:
    """One point of a loss curve.

    Attributes:
        step: Optimizer steps done.
        split: ``train``: mean over the step's batch; ``eval``: over the evaluation split;
            ``recovered``: over that split, of the full model with this step's adapter.
        loss: Mean negative log-likelihood per token that carries loss, in nats.
        learning_rate: Of that step; None for ``eval``.
        figures: What else the objective tells, see :data:`FIGURES`.
    """

    step: int
    split: Split
    loss: float
    learning_rate: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FitResult:
    """What a training run did.

    Attributes:
        steps: Optimizer steps done in all, those before a resume included.
        history: The loss curve, in order.
        trainable_params: How many parameters were trained.
        precision: ``fp32`` or ``bf16``.
        resumed_from: The step that a checkpoint gave back, or None.
        tokens: Real tokens of all steps; 0 where the objective does not count them.
        computed_tokens: The same with padding.
    """

    steps: int
    history: tuple[LossRow, ...]
    trainable_params: int
    precision: str
    resumed_from: int | None
    tokens: int = 0
    computed_tokens: int = 0

    @property
    def best_step(self) -> int | None:
        """The step whose evaluation was best; None without one."""
        return best_step(self.history)

    @property
    def final_loss(self) -> float:
        """The last step's training loss."""
        return [row.loss for row in self.history if row.split == "train"][-1]

    def eval_losses(self, step: int | None = None) -> tuple[float, float] | None:
        """Evaluation loss at the start and at the end, or None without an evaluation split.

        Args:
            step: After which the second one is; None for the last.
        """
        rows = [row for row in self.history if row.split == "eval"]
        if not rows:
            return None
        last = next((row for row in reversed(rows) if row.step == step), rows[-1])
        return rows[0].loss, last.loss

    def first_and_last(self, split: str) -> dict[str, tuple[float, float]]:
        """Each further figure at the first and the last point of a split that has it."""
        found: dict[str, list[float]] = {}
        for row in self.history:
            for name, value in row.figures.items() if row.split == split else ():
                found.setdefault(name, []).append(value)
        return {name: (values[0], values[-1]) for name, values in found.items()}

    def final_figures(self) -> dict[str, float]:
        """Mean of each further figure over the last tenth of the training steps."""
        rows = [row for row in self.history if row.split == "train" and row.figures]
        rows = rows[-max(1, len(rows) // 10) :]
        names = {name: None for row in rows for name in row.figures}
        found = {name: [r.figures[name] for r in rows if name in r.figures] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items()}


def best_step(history: Iterable[LossRow], split: str = "eval") -> int | None:
    """The step of the best evaluation after the start; the first of several equal ones.

    That of the highest reward where rewards are learnt, else of the lowest loss.

    Args:
        history: The loss curve.
        split: Whose rows count.
    """
    rows = [row for row in history if row.split == split and row.step > 0]
    if not rows:
        return None
    return min(rows, key=lambda row: (-row.figures.get("reward", -row.loss), row.step)).step


def evaluations_since_best(history: Iterable[LossRow]) -> int:
    """How many evaluations there were since the best one."""
    rows = list(history)
    best = best_step(rows)
    return sum(row.split == "eval" and best is not None and row.step > best for row in rows)


def resolve_precision(
    precision: Precision, device: str, params: int = 0
) -> Literal["fp32", "bf16"]:
    """What ``auto`` means on a device.

    On a CPU it is fp32, but for a large model where the CPU has matrix units for bf16: without
    them bf16 is slower, and a small model's step has little to multiply.

    Args:
        precision: As asked for.
        device: To compute on.
        params: Of the model.
    """
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    large = params >= _LARGE_PARAMS
    return "bf16" if large and torch.cpu.get_capabilities().get(_MATRIX_UNITS, False) else "fp32"


def weights_dtype(precision: Precision, device: str) -> torch.dtype:
    """The type to load frozen weights in: that of the computation.

    Trained parameters are kept in fp32, since bf16 has too few digits for the small steps of a
    small learning rate.
    """
    return torch.float32 if resolve_precision(precision, device) == "fp32" else torch.bfloat16


def curve_rows(log_history: list[dict[str, Any]]) -> tuple[LossRow, ...]:
    """The loss curve in a trainer's log."""
    rows = []
    for entry in log_history:
        if "loss" in entry:
            figures = _figures(entry, "")
            rows.append(
                LossRow(entry["step"], "train", entry["loss"], entry["learning_rate"], figures)
            )
        elif "eval_loss" in entry:
            rows.append(
                LossRow(entry["step"], "eval", entry["eval_loss"], None, _figures(entry, "eval_"))
            )
    return tuple(rows)


def _figures(entry: Mapping[str, Any], prefix: str) -> dict[str, float]:
    named = {name: entry.get(prefix + key) for key, name in FIGURES.items()}
    means = {
        f"reward_{match['name']}": value
        for key, value in entry.items()
        if (match := _ONE_REWARD.fullmatch(key, len(prefix))) and key.startswith(prefix)
    }
    # Of several rewards each has its own mean beside their sum.
    named |= means if len(means) > 1 else {}
    return {name: value for name, value in named.items() if value is not None}
