"""What each stage measures: one class a stage, as its manifest records it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loram_cli.errors import LoramError, reason_of
from loram_cli.evaluation.results import EvalResult, TrainingCost
from loram_cli.runs.manifest import Manifest
from loram_cli.schema import NOT_REVIVED, revived


@dataclass(frozen=True, kw_only=True)
class CalibrationFigures:
    """What calibration reads, and what it holds beside one decoder layer."""

    samples: int
    length: int
    activation_memory_bytes: int
    activation_disk_bytes: int
    hessian_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """A pruned model's size and widths.

    Attributes:
        pruned_params: Parameters of the output; of a sparse one those that are not zero.
        reduction: The base's parameters over these.
        removed_share: Share of the base's parameters that is gone.
        sparsity: Share of zeros asked for in the decoder linears; 0 where groups were dropped.
        calibration: What calibration took; None without it.
        ratio: The ratio that gave the widths; None with a plan file, and for sparse models.
        scope: ``layer`` or ``global``; None for sparse models.
        remove_params: At least how many parameters were to go.
        card_bytes: The least card to train on, where memory was the budget.
        pruned_layers: Indices of the layers that lost something.
        widths: Per layer attention heads, key/value heads and MLP channels.
        base_widths: The same of the base.
        experts_ratio: Share of experts that went; None where all stay.
        experts: Per layer that lost some, how many experts stay, and how many there were.
        zeros: Zeros counted in the decoder linears of a sparse model.
        measured_sparsity: Their share of ``decoder_linear_params``.
        bits: Of a weight of the decoder linears, where they are rounded; else None.
        group_size: Weights that share a step.
        codes: What their codes stand for: steps of a grid, or values of a trellis.
        linear_bytes: What the rounded decoder linears take.
        linear_share: That as a share of what they take in bf16.
        rounding_error: ``|rounded - weight|^2 / |weight|^2`` over all of them.
    """

    base_params: int
    pruned_params: int
    reduction: float
    removed_share: float
    weight_bytes: int
    sparsity: float = 0.0
    calibration: CalibrationFigures | None = None
    ratio: float | None = None
    scope: str | None = None
    remove_params: int | None = None
    card_bytes: int | None = None
    pruned_layers: tuple[int, ...] = ()
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    base_widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts_ratio: float | None = None
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    zeros: int | None = None
    decoder_linear_params: int | None = None
    measured_sparsity: float | None = None
    bits: int | None = None
    group_size: int | None = None
    codes: str | None = None
    linear_bytes: int | None = None
    linear_share: float | None = None
    rounding_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class FitFigures:
    """What a fit by gradient steps reached; None where there is no such figure.

    Attributes:
        steps: Optimizer steps.
        final_train_loss: Mean over the last steps.
        eval_loss_before: On held-out data, before the first step.
        eval_loss_after: The same after the last step.
    """

    steps: int = 0
    final_train_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None


@dataclass(frozen=True, kw_only=True)
class AlignFigures(FitFigures):
    """What alignment did to the pruned model.

    Attributes:
        tokens: Tokens that it saw.
        trained_params: Parameters that it trained.
        zeros: Of a sparse model, afterwards.
        layer_errors: Per layer the error of its output before and after, where layers were fitted.
    """

    tokens: int = 0
    trained_params: int | None = None
    zeros: int | None = None
    layer_errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MethodResult(AlignFigures):
    """What one method of alignment did."""

    method: str


@dataclass(frozen=True, kw_only=True)
class AlignResult(AlignFigures):
    """The last method's figures, with the whole chain's cost and first loss.

    Attributes:
        method: The methods in their order.
        chain: Each method's own figures; empty where there is one.
    """

    method: tuple[str, ...]
    chain: tuple[MethodResult, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainResult(FitFigures):
    """An adapter's training; the figures of preferences and rewards are those of their objectives.

    Attributes:
        objective: Its name.
        layout: Of the data.
        examples: That it trained on.
        targets: Modules with factors.
        trained_on_params: Parameters of the frozen model.
        lora_params: Trained parameters.
        best_step: The checkpoint with the best held-out figure, of the full model where it was
            taken; None without held-out data.
        kept_step: The checkpoint that the adapter is of, to which the losses belong.
        tokens: Real tokens that it learnt from; 0 where the objective does not count them.
        computed_tokens: The same with padding.
        recovered_loss_before: Held-out loss of the full model itself; None where it was not taken.
        recovered_loss_after: The same with the adapter.
        rewards: Of several rewards, the mean of each; ``reward`` is their weighted sum.
    """

    objective: str = "sft"
    layout: str | None = None
    examples: int = 0
    targets: tuple[str, ...] = ()
    trained_on_params: int = 0
    lora_params: int = 0
    best_step: int | None = None
    kept_step: int | None = None
    tokens: int = 0
    computed_tokens: int = 0
    recovered_loss_before: float | None = None
    recovered_loss_after: float | None = None
    eval_reward_accuracy_before: float | None = None
    eval_reward_accuracy_after: float | None = None
    eval_reward_margin_before: float | None = None
    eval_reward_margin_after: float | None = None
    eval_reward_before: float | None = None
    eval_reward_after: float | None = None
    eval_kl_before: float | None = None
    eval_kl_after: float | None = None
    eval_completion_tokens_before: float | None = None
    eval_completion_tokens_after: float | None = None
    final_train_reward_accuracy: float | None = None
    final_train_reward_margin: float | None = None
    final_train_reward: float | None = None
    final_train_kl: float | None = None
    final_train_completion_tokens: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecoverResult:
    """A recovered adapter: its modules, and parameters before and after.

    Attributes:
        unchanged: The factors had the base's shapes before: only experts without factors went.
        scale: What the update was multiplied by.
        scale_losses: The full model's loss in nats a token on training examples, by scale.
    """

    modules: int
    small_params: int
    full_params: int
    unchanged: bool = False
    scale: float = 1.0
    scale_losses: Mapping[str, float] = field(default_factory=dict)
    training: TrainingCost | None = None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A merged checkpoint."""

    modules: int
    weight_bytes: int
    layout: str | None = None


Result = PruneResult | AlignResult | TrainResult | RecoverResult | MergeResult | EvalResult
_RESULTS: dict[str, type[Any]] = {
    "prune": PruneResult,
    "align": AlignResult,
    "train": TrainResult,
    "recover": RecoverResult,
    "merge": MergeResult,
    "eval": EvalResult,
}


def result_of(manifest: Manifest) -> Result:
    """What a manifest's stage measured.

    Raises:
        LoramError: It is no stage of this version, or its results are not of the kind here.
    """
    try:
        found: Result = revived(_RESULTS[manifest.stage], manifest.results)
    except NOT_REVIVED as error:
        raise LoramError(
            f"loram.json of '{manifest.stage}': its results cannot be read "
            f"({type(error).__name__}: {reason_of(error)})",
            "was it written by another version, or changed?",
        ) from error
    return found


def training_cost(manifest: Manifest) -> TrainingCost | None:
    """What the adapter in a directory cost to train, from its manifest; None for no adapter."""
    result = result_of(manifest)
    if isinstance(result, RecoverResult):
        return result.training
    if not isinstance(result, TrainResult):
        return None
    return TrainingCost(
        trained_on_params=result.trained_on_params,
        lora_params=result.lora_params,
        layout=result.layout,
        peak_memory_bytes=manifest.peak_memory_bytes,
        peak_memory_increase_bytes=manifest.peak_memory_increase_bytes,
        wall_seconds=manifest.wall_seconds,
    )
