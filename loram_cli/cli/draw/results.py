"""What a stage measured, in a few lines."""

from functools import singledispatch

from loram_cli.cli.draw.widths import prune_line, width_advice
from loram_cli.stages.core.results import (
    AlignResult,
    FitFigures,
    PruneResult,
    RecoverResult,
    Result,
    TrainResult,
)
from loram_cli.units import format_params


@singledispatch
def result_lines(result: Result) -> list[str]:
    """The figures worth showing; none of a merge, and of an evaluation its own table."""
    return []


@result_lines.register
def _pruned(result: PruneResult) -> list[str]:
    return [f"{format_params(result.base_params)} -> {prune_line(result)}", *width_advice(result)]


@result_lines.register
def _aligned(result: AlignResult) -> list[str]:
    return _losses(result, result.tokens)


@result_lines.register
def _trained(result: TrainResult) -> list[str]:
    trained_on = format_params(result.trained_on_params)
    lines = [f"LoRA of {format_params(result.lora_params)} parameters on {trained_on}"]
    if result.eval_reward_accuracy_after is not None:
        lines.append(
            f"held-out preferences: {result.eval_reward_accuracy_after:.1%} right, reward margin "
            f"{result.eval_reward_margin_before:.3f} -> {result.eval_reward_margin_after:.3f} "
            f"in {result.steps} steps"
        )
    elif result.eval_reward_margin_after is not None:
        lines.append(
            f"held-out reward margin, good over bad: {result.eval_reward_margin_before:.3f} -> "
            f"{result.eval_reward_margin_after:.3f} in {result.steps} steps"
        )
    elif result.eval_reward_after is not None:
        lines.append(
            f"held-out reward {result.eval_reward_before:.3f} -> {result.eval_reward_after:.3f} "
            f"in {result.steps} steps (one answer drawn per question)"
        )
    elif result.objective == "sft":
        lines += _losses(result)
    if result.recovered_loss_before is not None and result.recovered_loss_after is not None:
        lines.append(
            f"on the full model {result.recovered_loss_before:.4f} -> "
            f"{result.recovered_loss_after:.4f}"
        )
    if result.kept_step not in (None, result.steps):
        lines.append(f"kept: the checkpoint of step {result.kept_step}, the best one")
    if result.tokens:
        share = result.computed_tokens / result.tokens
        lines.append(f"{result.tokens:,} tokens seen, {share:.2f} computed for each of them")
    return lines


@result_lines.register
def _recovered(result: RecoverResult) -> list[str]:
    return [*_scattered(result), *_scaled(result)]


def _scaled(result: RecoverResult) -> list[str]:
    """What scaling the update brought, where it was asked for."""
    if not result.scale_losses:
        return []
    before, after = (result.scale_losses[f"{scale:.4g}"] for scale in (1.0, result.scale))
    if result.scale == 1:
        return [f"update left as it is: no other scale lowers the full model's loss ({before:.4f})"]
    return [
        f"update scaled by {result.scale:g}: "
        f"the full model's loss on training examples {before:.4f} -> {after:.4f}"
    ]


def _scattered(result: RecoverResult) -> list[str]:
    if result.unchanged:
        return [
            f"{result.modules} modules verified: they have the base's shapes as they were trained, "
            "so recovery is the identity; any server that runs the base loads the adapter"
        ]
    what = "kept rows and columns equal, zero elsewhere"
    return [
        f"{result.modules} modules verified: {what}; "
        f"{format_params(result.small_params)} -> {format_params(result.full_params)} parameters"
    ]


def _losses(result: FitFigures, tokens: int = 0) -> list[str]:
    if result.eval_loss_before is None or result.eval_loss_after is None:
        return []
    cost = f"{result.steps} steps" if result.steps else f"{tokens} tokens"
    return [
        f"held-out loss {result.eval_loss_before:.4f} -> {result.eval_loss_after:.4f} in {cost}"
    ]
