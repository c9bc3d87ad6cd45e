"""Learning a teacher: the pruned model's next-token distribution towards the full one's."""

from dataclasses import dataclass
from typing import Any

import torch

from loram_cli.training.data.tokens import IGNORED_LABEL
from loram_cli.training.loop.trainer import StepTrainer


@dataclass(frozen=True)
class Teaching:
    """Whom to learn from.

    Attributes:
        teacher: The full causal LM, frozen, on the same device.
        temperature: Both distributions are softened by it (Hinton et al., arXiv 1503.02531).
    """

    teacher: Any
    temperature: float = 1.0


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL(teacher || student), summed over the tokens that carry loss, times temperature squared.

    Args:
        student: Logits, shape (batch, length, vocabulary).
        teacher: Logits of the same shape.
        labels: Token ids, shape (batch, length); the logits at a position predict the next one.
        temperature: Softens both. Its square keeps the gradient's scale (section 2 there).
    """
    counted = labels[:, 1:] != IGNORED_LABEL
    p, q = (
        torch.log_softmax(logits[:, :-1][counted].float() / temperature, dim=-1)
        for logits in (teacher, student)
    )
    return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) * temperature**2


class DistillTrainer(StepTrainer):
    """A trainer whose loss is the distance to the teacher's distribution."""

    def __init__(self, *args: Any, teaching: Teaching, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teaching = teaching

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Mean loss per token of the whole batch, of which ``inputs`` is one micro-batch."""
        labels, ids = inputs["labels"], inputs["input_ids"]
        with torch.no_grad():
            wanted = self._teaching.teacher(input_ids=ids, use_cache=False).logits
        outputs = model(input_ids=ids, use_cache=False)
        loss = distillation_loss(outputs.logits, wanted, labels, self._teaching.temperature)
        count = num_items_in_batch
        if count is None:
            count = (labels[:, 1:] != IGNORED_LABEL).sum()
        loss = loss / count
        return (loss, outputs) if return_outputs else loss
