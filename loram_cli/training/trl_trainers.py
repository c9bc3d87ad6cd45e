"""The door to TRL: its trainers, fitted to the loop's checkpoints and to LoRA heads.

The version is pinned, because more of its trainers is used than their public face.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.utils import RepeatSampler

from loram_cli.modeling.chunked_loss import install_token_scores
from loram_cli.quiet import quiet_trl
from loram_cli.training.loop.job import TrainerParts
from loram_cli.training.loop.options import (
    JudgedOptions,
    PairLoss,
    PreferenceOptions,
    RewardOptions,
)
from loram_cli.training.loop.trainer import LeanCheckpoints, WholeBatches

_REFERENCE = "ref"


class _Quiet(LeanCheckpoints):
    """Sends no telemetry, and writes no card beside checkpoints."""

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the stage writes its own card."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent."""
        with quiet_trl():
            theirs: Any = super()
            return theirs.train(*args, **kwargs)


class PreferenceTrainer(WholeBatches, _Quiet, DPOTrainer):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290)."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # Its rows are tokens already, rendered as supervised tuning renders them.
        return dataset


class OddsTrainer(PreferenceTrainer):
    """Odds ratio preference optimization (Hong et al., arXiv 2403.07691).

    TRL's own trainer of it is experimental, takes texts, and holds all logits at once; this one is
    its loss on the batches and the scores of the DPO trainer.
    """

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"]
        scores = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"].masked_fill(mask == 0, -100),
            use_cache=False,
            fused_lm_head=True,
        )
        lengths = mask[:, 1:].sum(-1).clamp(min=1)
        chosen, rejected = (scores.log_probs.sum(-1) / lengths).chunk(2)
        loss, log_odds = odds_ratio_loss(chosen, rejected, self.beta)
        rewards = {
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": self.beta * (chosen - rejected).mean(),
            "log_odds": log_odds.mean(),
        }
        for name, value in rewards.items():
            gathered = self.accelerator.gather_for_metrics(value.detach()).mean().item()
            self._metrics[mode][name].append(gathered)
        return (loss, scores) if return_outputs else loss


def odds_ratio_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 6 of arXiv 2403.07691: likelihood of the chosen answer, and the odds ratio.

    Args:
        chosen: Mean log-probability of a chosen answer's tokens, shape (pairs,).
        rejected: Of the rejected one's.
        weight: Of the odds ratio.

    Returns:
        The loss, a scalar, and each pair's log odds ratio.
    """
    chosen, rejected = chosen.float(), rejected.float()
    # log(1 - p); a probability of 1 has no odds.
    log_nots = [torch.log1p(-torch.exp(side.clamp(max=-1e-6))) for side in (chosen, rejected)]
    log_odds = (chosen - rejected) - (log_nots[0] - log_nots[1])
    return (-chosen - weight * logsigmoid(log_odds)).mean(), log_odds


class JudgedTrainer(WholeBatches, _Quiet, KTOTrainer):
    """Kahneman-Tversky optimization (Ethayarajh et al., arXiv 2402.01306)."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # Its rows are tokens already, rendered as supervised tuning renders them.
        return dataset


class MismatchedAnswers:
    """Gives each prompt of a pass the answer of the one before it, which estimates the KL term.

    TRL pairs them once, and so must keep the order of the data; here any order will do.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of TRL's collator."""
        answers = [row["completion_ids"] for row in rows]
        others = [answers[-1], *answers[:-1]]
        return self._collator(
            [{**row, "KL_completion_ids": other} for row, other in zip(rows, others, strict=True)]
        )


class RewardTrainer(_Quiet, GRPOTrainer):
    """Group relative policy optimization (Shao et al., arXiv 2402.03300)."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # Generation passes the trainer's wrapper by, which lets bf16 weights meet fp32 factors.
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> "EpochSampler":
        theirs = super()._get_train_sampler(dataset)
        return EpochSampler(
            theirs.data_source,
            theirs.mini_repeat_count,
            theirs.batch_size,
            theirs.repeat_count,
            theirs.shuffle,
            theirs.seed,
        )


class EpochSampler(RepeatSampler):
    """TRL's sampler, but an epoch's order does not hang on whether the epochs before it were run.

    A resumed training passes over them, and must then see the questions in the same order.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop at the start of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Indices, each question as often as it is drawn for."""
        self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()


def preference_trainer(
    parts: TrainerParts,
    tokenizer: Any,
    train: Any,
    evaluation: Any,
    how: PreferenceOptions,
    loss: PairLoss = "dpo",
) -> PreferenceTrainer:
    """A DPO or ORPO trainer; data sets have ``prompt_ids``, ``chosen_ids``, ``rejected_ids``."""
    # Rows are cut already, and the user told.
    settings = {"arguments_class": DPOConfig, "beta": how.beta, "max_length": None}
    given = _given(parts, tokenizer, train, evaluation, settings)
    keep = how.keeps_reference and loss == "dpo"
    with _accepted_by_trl(parts, keep=keep, temperature=1.0):
        return _PAIR_TRAINERS[loss](**given)


_PAIR_TRAINERS: dict[PairLoss, type[PreferenceTrainer]] = {
    "dpo": PreferenceTrainer,
    "orpo": OddsTrainer,
}


def judged_trainer(
    parts: TrainerParts, tokenizer: Any, train: Any, evaluation: Any, how: JudgedOptions
) -> JudgedTrainer:
    """A KTO trainer; data sets have ``prompt_ids``, ``completion_ids`` and ``label``."""
    settings = {
        "arguments_class": KTOConfig,
        "beta": how.beta,
        "max_length": None,
        "desirable_weight": how.good_weight,
        "undesirable_weight": how.bad_weight,
    }
    given = _given(parts, tokenizer, train, evaluation, settings)
    collator = DataCollatorForUnpairedPreference(
        pad_token_id=tokenizer.pad_token_id,
        pad_to_multiple_of=8 if parts.device == "cuda" else None,
    )
    with _accepted_by_trl(parts, keep=how.keeps_reference, temperature=1.0):
        return JudgedTrainer(**given, data_collator=MismatchedAnswers(collator))


def reward_trainer(
    parts: TrainerParts,
    tokenizer: Any,
    train: Any,
    evaluation: Any,
    how: RewardOptions,
    rewards: list[Callable[..., Any]],
) -> RewardTrainer:
    """A GRPO trainer; data sets have ``prompt``, and what the rewards take by name."""
    settings = {
        "arguments_class": GRPOConfig,
        "beta": how.beta,
        "num_generations": how.generations,
        # One draw per question estimates the mean reward as well as several of fewer questions.
        "num_generations_eval": 1,
        "max_completion_length": how.max_completion_length,
        "temperature": how.temperature,
        "reward_weights": how.reward_weights and list(how.reward_weights),
    }
    given = _given(parts, tokenizer, train, evaluation, settings)
    keep = how.keeps_reference and how.beta > 0
    with _accepted_by_trl(parts, keep=keep, temperature=how.temperature):
        return RewardTrainer(reward_funcs=rewards, **given)


def _given(
    parts: TrainerParts, tokenizer: Any, train: Any, evaluation: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """What both trainers are made of."""
    return {
        "model": parts.model,
        "args": parts.arguments(
            pad_to_multiple_of=8 if parts.device == "cuda" else None,
            # TRL's own default is to checkpoint gradients; the loop's argument decides here.
            gradient_checkpointing=False,
            disable_dropout=True,
            **settings,
        ),
        "train_dataset": train,
        "eval_dataset": evaluation,
        "processing_class": tokenizer,
        "callbacks": parts.callbacks,
    }


def drop_reference(model: Any) -> None:
    """Take the frozen copy that served as reference off the model, if there is one."""
    if _REFERENCE in model.peft_config:
        model.delete_adapter(_REFERENCE)


@contextmanager
def _accepted_by_trl(parts: TrainerParts, *, keep: bool, temperature: float) -> Iterator[None]:
    """Build a trainer inside; what its constructor does to the model is put right afterwards.

    It refuses factors on the head, which its own head would pass by (ours does not); it rounds
    the factors of a 4-bit model to bf16, too coarse for small steps; and it copies any adapter as
    a reference, a fresh one too.
    """
    model = parts.model
    factors = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_output_embeddings
    for name, parameter in model.named_parameters():
        if name in factors:
            parameter.data = factors[name]
    if not keep:
        drop_reference(model)
    full = parts.options.cross_entropy == "full"
    install_token_scores(model, temperature=temperature, chunk=2**31 if full else None)
