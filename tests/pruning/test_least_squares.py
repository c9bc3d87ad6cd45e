"""The closed form of reconstruction, against numpy's least squares."""

import numpy as np
import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.pruning.least_squares import NormalEquations


def problem(tokens: int = 60, inputs: int = 7, outputs: int = 5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=generator)
    y = torch.randn(tokens, outputs, generator=generator)
    return x, y, torch.randn(outputs, inputs, generator=generator)


def fitted(x, y, weight, ridge, batch=16):
    equations = NormalEquations(weight)
    for start in range(0, len(x), batch):
        equations.add(x[start : start + batch], y[start : start + batch])
    assert equations.tokens == len(x)
    return equations.solve(ridge).numpy()


def test_equals_least_squares_without_a_ridge():
    x, y, weight = problem()
    expected = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(fitted(x, y, weight, 0.0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_equals_least_squares_with_the_ridge_as_rows(ridge):
    x, y, weight = problem()
    # The penalty is that many more "tokens": sqrt(damp) times each input alone wants W0's column.
    root = np.sqrt(ridge * (x.double() ** 2).sum(0).mean().item())
    rows = np.vstack([x.double().numpy(), root * np.eye(x.shape[1])])
    wanted = np.vstack([y.double().numpy(), root * weight.double().numpy().T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(fitted(x, y, weight, ridge), expected, rtol=1e-9, atol=1e-12)


def test_directions_without_data_keep_the_pruned_weight():
    x, y, weight = problem()
    x[:, 2] = 0
    found = fitted(x, y, weight, 1e-6)
    np.testing.assert_allclose(found[:, 2], weight[:, 2].double().numpy(), rtol=1e-12)
    assert np.abs(found[:, 0] - weight[:, 0].numpy()).max() > 0.1
    assert (fitted(torch.zeros_like(x), y, weight, 0.1) == weight.double().numpy()).all()


def test_too_few_tokens_and_infinities_are_said():
    x, y, weight = problem(tokens=4)
    with pytest.raises(LoramError, match="4 calibration tokens do not determine"):
        fitted(x, y, weight, 0.0)
    x[0, 0] = float("inf")
    with pytest.raises(LoramError, match="not finite"):
        fitted(x, y, weight, 0.1)
