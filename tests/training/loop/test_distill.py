"""The distillation loss, against torch's own divergence and finite teachers."""

import pytest
import torch

from loram_cli.training.data.tokens import IGNORED_LABEL
from loram_cli.training.loop.distill import distillation_loss


def logits():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 5, 11, generator=generator) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_is_the_divergence_of_the_tokens_that_count(temperature):
    student, teacher = logits()
    labels = torch.ones(2, 5, dtype=torch.long)
    labels[0, :3] = IGNORED_LABEL
    expected = 0.0
    for row, position in [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]:
        p = torch.distributions.Categorical(logits=teacher[row, position] / temperature)
        q = torch.distributions.Categorical(logits=student[row, position] / temperature)
        expected += float(torch.distributions.kl_divergence(p, q)) * temperature**2
    found = distillation_loss(student, teacher, labels, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_is_zero_for_the_teacher_itself():
    _, teacher = logits()
    labels = torch.ones(2, 5, dtype=torch.long)
    assert float(distillation_loss(teacher, teacher, labels, 3.0)) == pytest.approx(0, abs=1e-6)
