"""A linear of few bits computes as a floating one, and keeps none for the way back."""

import pytest
import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import pack, weight_of
from loram_cli.modeling.low_bit_linear import LowBitLinear
from loram_cli.modeling.low_bit_training import TrainedLowBitLinear
from loram_cli.pruning.rounding import round_nearest

KINDS = (LowBit(3, 8), LowBit(2, 8, "trellis"))


@pytest.fixture(params=KINDS, ids=lambda low_bit: low_bit.codes)
def low_bit(request: pytest.FixtureRequest) -> LowBit:
    return request.param


@pytest.fixture
def plain() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(20, 12).requires_grad_(False)


@pytest.fixture
def rows(plain: torch.nn.Linear, low_bit: LowBit) -> torch.Tensor:
    return pack(round_nearest(plain.weight, low_bit), low_bit)


def packed_linear(plain: torch.nn.Linear, rows: torch.Tensor, low_bit: LowBit) -> LowBitLinear:
    linear = LowBitLinear(plain, low_bit, torch.float32)
    linear.weight = torch.nn.Parameter(rows, requires_grad=False)
    return linear


def test_it_computes_as_the_floating_weight(
    plain: torch.nn.Linear, rows: torch.Tensor, low_bit: LowBit
):
    linear = packed_linear(plain, rows, low_bit)
    weight = weight_of(rows, low_bit, 20, torch.float32)
    inputs = torch.randn(2, 5, 20, requires_grad=True)
    expected = torch.nn.functional.linear(inputs, weight, plain.bias)
    assert torch.equal(linear(inputs), expected)
    assert torch.equal(linear.floating(torch.float32), weight)
    (theirs,) = torch.autograd.grad(expected.square().sum(), inputs)
    (mine,) = torch.autograd.grad(linear(inputs).square().sum(), inputs)
    torch.testing.assert_close(mine, theirs)


def test_autograd_keeps_the_bytes_alone(
    plain: torch.nn.Linear, rows: torch.Tensor, low_bit: LowBit
):
    linear, kept = packed_linear(plain, rows, low_bit), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(torch.randn(3, 20, requires_grad=True))
    assert [tensor.dtype for tensor in kept] == [torch.uint8]


def test_autocast_decides_the_type(plain: torch.nn.Linear, rows: torch.Tensor, low_bit: LowBit):
    linear = packed_linear(plain, rows, low_bit)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 20)).dtype == torch.bfloat16


def test_what_is_trained_starts_and_ends_as_it_is_stored(
    plain: torch.nn.Linear, rows: torch.Tensor, low_bit: LowBit
):
    trained = TrainedLowBitLinear(plain, rows, low_bit, "cpu")
    assert torch.equal(trained.packed(), rows)
    inputs, wanted = torch.randn(64, 20), torch.randn(64, 12)
    optimizer = torch.optim.Adam(trained.own_parameters(), lr=2e-3)

    def error() -> torch.Tensor:
        return (trained(inputs) - wanted).square().mean()

    before = error().item()
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    # On a trellis only steps and scales move.
    assert error().item() < {"grid": 0.9, "trellis": 0.97}[low_bit.codes] * before
    stored = weight_of(trained.packed(), low_bit, 20, torch.float32)
    again = torch.nn.functional.linear(inputs, stored, plain.bias)
    torch.testing.assert_close(trained(inputs), again)
