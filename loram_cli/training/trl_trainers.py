"""The door to TRL: its DPO and GRPO trainers, fitted to the loop's checkpoints and to LoRA heads.

The version is pinned, because more of its trainers is used than their public face.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from loram_cli.modeling.chunked_loss import install_token_scores
from loram_cli.quiet import quiet_trl
from loram_cli.training.loop.job import TrainerParts
from loram_cli.training.loop.options import PreferenceOptions, RewardOptions
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
    parts: TrainerParts, tokenizer: Any, train: Any, evaluation: Any, how: PreferenceOptions
) -> PreferenceTrainer:
    """A DPO trainer; data sets have ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""
    # Rows are cut already, and the user told.
    settings = {"arguments_class": DPOConfig, "beta": how.beta, "max_length": None}
    given = _given(parts, tokenizer, train, evaluation, settings)
    with _accepted_by_trl(parts, keep=how.keeps_reference, temperature=1.0):
        return PreferenceTrainer(**given)


def reward_trainer(
    parts: TrainerParts,
    tokenizer: Any,
    train: Any,
    evaluation: Any,
    how: RewardOptions,
    reward: Callable[..., list[float]],
) -> RewardTrainer:
    """A GRPO trainer; data sets have ``prompt``, and what ``reward`` takes by name."""
    settings = {
        "arguments_class": GRPOConfig,
        "beta": how.beta,
        "num_generations": how.generations,
        # One draw per question estimates the mean reward as well as several of fewer questions.
        "num_generations_eval": 1,
        "max_completion_length": how.max_completion_length,
        "temperature": how.temperature,
    }
    given = _given(parts, tokenizer, train, evaluation, settings)
    keep = how.keeps_reference and how.beta > 0
    with _accepted_by_trl(parts, keep=keep, temperature=how.temperature):
        return RewardTrainer(reward_funcs=reward, **given)


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
