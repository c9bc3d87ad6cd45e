"""Two factors of a weight, against the best that there can be."""

import numpy as np
import torch

from loram_cli.pruning.lowrank import factor_names, factored_name, whitened_factors


def test_factors_lose_least_of_the_output():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 8, generator=generator) * torch.tensor([5.0, 1, 1, 1, 0.1, 0.1, 3, 1])
    weight = torch.randn(6, 8, generator=generator)
    first, second = whitened_factors(weight, x.T @ x, 3, 1e-9, "w")
    assert first.shape == (3, 8) and second.shape == (6, 3)
    lost = float((x @ (weight - second @ first).T).norm())
    # No matrix of this rank comes nearer to the output (Eckart and Young).
    values = np.linalg.svd((x @ weight.T).double().numpy(), compute_uv=False)
    assert abs(lost - np.sqrt((values[3:] ** 2).sum())) < 1e-3 * lost
    left, singular, right = torch.linalg.svd(weight)
    plain = left[:, :3] * singular[:3] @ right[:3]
    assert lost < 0.95 * float((x @ (weight - plain).T).norm())


def test_names_of_factors_and_back():
    known = {"m.q_proj.weight", "m.q_proj.bias"}
    names = factor_names("m.q_proj.weight")
    assert names == ("m.q_proj.first.weight", "m.q_proj.second.weight")
    assert {factored_name(name, known) for name in names} == {"m.q_proj.weight"}
    assert factored_name("m.q_proj.second.bias", known) == "m.q_proj.bias"
    assert factored_name("m.q_proj.weight", known) == "m.q_proj.weight"
