import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from loram_cli.errors import LoramError, UsageError
from loram_cli.export.gguf_types import (
    FILE_TYPES,
    WRITABLE,
    check_block,
    check_writable,
    decode,
    encode,
    is_quantized,
    type_named,
)

# The largest step between two values of a block, as a share of the block's largest value.
STEP = {"f32": 0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 1 / 127, "q5_1": 2 / 31, "q5_0": 1 / 16,
        "q4_1": 2 / 15, "q4_0": 1 / 8}  # fmt: skip


@pytest.mark.parametrize("name", WRITABLE)
def test_a_weight_comes_back_within_its_types_step(name):
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    kind = type_named(name.upper())
    stored = encode(weight, kind, "w")
    assert (stored.dtype, stored.shape[0]) == (np.uint8, 7)
    back = decode(stored, kind)
    blocks = weight.reshape(-1, 32).abs().amax(1, keepdim=True)
    error = (back - weight).reshape(-1, 32).abs()
    assert (error <= blocks * STEP[name] * 1.01).all()
    assert is_quantized(kind) == name.startswith("q")
    assert kind in FILE_TYPES


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match="q4_k_m"):
        type_named("q4_k_m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(value):
    weight = torch.ones(2, 32)
    weight[1, 3] = value
    with pytest.raises(LoramError, match="here: NaN or infinite"):
        encode(weight, Type.Q8_0, "here")


def test_what_float16_cannot_hold_is_refused():
    weight = torch.full((1, 32), 70000.0)
    with pytest.raises(LoramError, match=r"here: 7e\+04 is beyond what F16 holds"):
        encode(weight, Type.F16, "here")
    back = decode(encode(weight, Type.BF16, "here"), Type.BF16)
    assert back[0, 0] == pytest.approx(7e4, rel=0.01)


def test_types_that_cannot_be_written_are_named():
    with pytest.raises(LoramError, match=r"here: its type Q4_K can be read but not written") as e:
        check_writable("here", Type.Q4_K, Type.Q4_K)
    assert "q8_0" in e.value.hint
    check_writable("here", Type.Q4_K, Type.Q8_0)
    with pytest.raises(LoramError, match="cannot read its type Q8_K"):
        check_writable("here", Type.Q8_K, Type.Q8_0)


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(UsageError, match=r"rows of 40 are no multiple of 32, which Q4_0 packs"):
        check_block("here", 40, Type.Q4_0)
    check_block("here", 40, Type.F16)
