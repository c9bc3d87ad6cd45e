"""Weights in one piece of memory, and read back from a copy of it."""

import pytest
import torch

from loram_cli.modeling.layer_buffers import buffer_bytes, write_weights
from loram_cli.modeling.quantize import nf4_weight
from loram_cli.modeling.skeleton import Slot, Weight


def slot(weight: Weight, num_bytes: int) -> Slot:
    return Slot("w", (), weight.data.shape, weight.quant_state is not None, None, num_bytes)


def test_weights_of_any_type_are_read_back_from_a_copy():
    weights = [
        Weight(torch.randn(3, 5)), Weight(torch.randn(7).bfloat16()), Weight(torch.randn(2, 1)),
    ]  # fmt: skip
    slots = [slot(weight, weight.data.nbytes) for weight in weights]
    buffer = torch.empty(buffer_bytes(slots), dtype=torch.uint8)
    layout = write_weights(iter(weights), buffer)
    assert layout.num_bytes <= len(buffer)
    assert all(offset % 256 == 0 for offset in layout.offsets)
    other = buffer[: layout.num_bytes].clone()
    for found, weight in zip(layout.views(other), weights, strict=True):
        assert found.data.dtype == weight.data.dtype and torch.equal(found.data, weight.data)
        assert found.data.untyped_storage().data_ptr() == other.data_ptr()


def test_nf4_is_read_back_with_its_constants():
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = nf4_weight(torch.randn(96, 80))
    weight = Weight(packed.data.as_subclass(torch.Tensor), packed.quant_state)
    buffer = torch.empty(buffer_bytes([slot(weight, 96 * 80)]), dtype=torch.uint8)
    layout = write_weights([weight], buffer)
    (found,) = layout.views(buffer.clone())
    assert found.quant_state is not weight.quant_state
    assert torch.equal(
        functional.dequantize_4bit(found.data, found.quant_state),
        functional.dequantize_4bit(weight.data, weight.quant_state),
    )
    # The layout holds no weight, and the weight's own state is what it was.
    assert layout.weights[0].data.is_meta and layout.weights[0].quant_state.state2.absmax.is_meta
    assert not weight.quant_state.absmax.is_meta


def test_a_buffer_that_is_too_small_is_refused():
    with pytest.raises(RuntimeError):
        write_weights([Weight(torch.randn(100))], torch.empty(300, dtype=torch.uint8))
