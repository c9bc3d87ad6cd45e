"""Values of trellis codes: looked up one by one, in any type, and near enough to Gaussian numbers."""

import pytest
import torch

from loram_cli.checkpoint.low_bit import BITS
from loram_cli.checkpoint.trellis import WINDOW, table, values_of
from loram_cli.pruning.trellis import best_codes


def one_by_one(group: list[int], bits: int) -> list[float]:
    """Each value by the codes of its window, zeros before the first."""
    values, found = table(bits), []
    for i in range(len(group)):
        place = 0
        for before in range(WINDOW[bits] - 1, -1, -1):
            place = place * 2**bits + (group[i - before] if i >= before else 0)
        found.append(float(values[place]))
    return found


@pytest.mark.parametrize("bits", BITS)
def test_a_value_is_told_by_its_code_and_those_before_it(bits: int):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, 2, 16), generator=generator).to(torch.uint8)
    found = values_of(codes, bits, torch.float32)
    expected = [[one_by_one(group, bits) for group in row] for row in codes.tolist()]
    assert found.tolist() == expected
    half = values_of(codes, bits, torch.bfloat16)
    assert torch.equal(half, found.to(torch.bfloat16))


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.084), (3, 0.0225), (4, 0.0065)])
def test_gaussian_numbers_lose_less_than_with_values_of_ones_own_choice(bits: int, bound: float):
    """The best 4, 8 and 16 values (Lloyd and Max) lose 0.1175, 0.0345 and 0.0095."""
    numbers = torch.randn(300, 64, generator=torch.Generator().manual_seed(5))
    values = values_of(best_codes(numbers, bits).unsqueeze(1), bits, torch.float32)[:, 0]
    assert (numbers - values).square().mean() < bound


def test_a_table_first_used_without_gradients_serves_with_them():
    codes = torch.zeros(1, 1, 8, dtype=torch.uint8)
    with torch.inference_mode():
        values_of(codes, 3, torch.float64)
    weight = values_of(codes, 3, torch.float64)
    inputs = torch.ones(8, dtype=torch.float64, requires_grad=True)
    (weight * inputs).sum().backward()
    assert torch.equal(inputs.grad, weight.reshape(-1))
