"""Products that nothing reads: found in autograd's graph, and left out without a trace."""

import pytest
import torch

from loram_cli.modeling.layerwise.unvalued import left_out, recorded_products, without_readers


class Block(torch.nn.Module):
    """A residual block; ``after`` reads what the last product gave."""

    def __init__(self, after=None, parallel=False):
        super().__init__()
        self.attention, self.up, self.down = (
            torch.nn.Linear(*shape, bias=False).requires_grad_(False)
            for shape in ((8, 8), (8, 12), (12, 8))
        )
        self.a = torch.nn.Linear(8, 12, bias=False)
        self.after, self.parallel = after or (lambda value: value), parallel

    def forward(self, hidden):
        mixed = hidden + self.attention(torch.tanh(hidden))
        given = hidden if self.parallel else mixed
        inner = torch.tanh(self.up(given) + self.a(given))
        return (mixed + self.after(self.down(inner))).view(hidden.shape)


def found(block, hidden):
    with recorded_products(block) as nodes:
        out = block(hidden)
    assert set(nodes) == {block.attention, block.up, block.down}
    return without_readers(out, nodes)


@pytest.fixture
def hidden():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, requires_grad=True)


def test_only_what_is_added_into_the_output_has_no_reader(hidden):
    block = Block()
    assert found(block, hidden) == [block.down]
    # Without a norm between them, attention's product is added and nothing more.
    parallel = Block(parallel=True)
    assert set(found(parallel, hidden)) == {parallel.attention, parallel.down}
    assert set(found(block, hidden)) == {block.down}


@pytest.mark.parametrize("after", [torch.tanh, lambda v: v * v, lambda v: v / v.norm()])
def test_what_a_gradient_depends_on_is_read(hidden, after):
    assert found(Block(after), hidden) == []


def test_gradients_are_the_same_to_the_bit(hidden):
    block, gradient = Block(parallel=True), torch.randn(2, 3, 8)

    def gradients(linears):
        hidden.grad = block.a.weight.grad = None
        with left_out(linears):
            out = block(hidden)
        out.backward(gradient)
        return hidden.grad, block.a.weight.grad, out

    *whole, value = gradients([])
    *without, other = gradients(found(block, hidden))
    assert all(map(torch.equal, whole, without))
    assert not torch.equal(value, other)
    # And the linears are as they were.
    assert torch.equal(block(hidden), value)
