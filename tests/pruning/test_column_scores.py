"""Scores of a module's input features, against least squares done by hand."""

import numpy as np
import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.pruning.column_scores import obs_scores, wanda_scores


def problem(columns: int = 6, rows: int = 5, tokens: int = 80):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, columns, generator=generator)
    # A feature that others tell of can go for nothing.
    x[:, 2] = x[:, 0] - x[:, 1] + 0.01 * torch.randn(tokens, generator=generator)
    return x, torch.randn(rows, columns, generator=generator)


def loss_without(x, weight, columns):
    """Squared error of the output once the other columns are refitted."""
    wanted = (x @ weight.T).double().numpy()
    left = [i for i in range(x.shape[1]) if i not in columns]
    known = x[:, left].double().numpy()
    found = np.linalg.lstsq(known, wanted, rcond=None)[0]
    return float(((known @ found - wanted) ** 2).sum())


def test_obs_scores_are_what_refitted_outputs_lose():
    x, weight = problem()
    scores = obs_scores(weight, x.T @ x, 6, dampening=1e-9)
    order = scores.argsort().tolist()
    # One of the three that depend on each other goes first, and costs next to nothing.
    assert order[0] in (0, 1, 2)
    for gone in range(1, 5):
        lost = loss_without(x, weight, order[:gone])
        assert float(scores[order[gone - 1]]) == pytest.approx(lost, rel=1e-3, abs=1e-3)


def test_obs_scores_of_groups_take_their_columns_together():
    x, weight = problem()
    scores = obs_scores(weight, x.T @ x, 3, dampening=1e-9)
    first = int(scores.argmin())
    losses = [loss_without(x, weight, [2 * g, 2 * g + 1]) for g in range(3)]
    assert first == int(np.argmin(losses))
    assert float(scores[first]) == pytest.approx(losses[first], rel=1e-3)


def test_wanda_scores_weigh_magnitudes_by_their_inputs():
    x, weight = problem()
    found = wanda_scores(weight, x.T @ x, 3)
    columns = (weight.abs().sum(0) * x.norm(dim=0)).double()
    torch.testing.assert_close(found, columns.reshape(3, 2).sum(1), rtol=1e-5, atol=1e-6)


def test_a_hessian_without_text_is_said():
    with pytest.raises(LoramError, match="cannot be inverted"):
        obs_scores(torch.ones(2, 3), torch.zeros(3, 3), 3, dampening=0.01)
