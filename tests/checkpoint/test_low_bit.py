"""Rows of few bits: packing, how they are read, and what a config may say of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.checkpoint.low_bit import BITS, CONFIG_KEY, CodeKind, LowBit
from loram_cli.checkpoint.low_bit_codes import (
    STEPS,
    Codes,
    dequantize,
    pack,
    unpack,
    weight_of,
)
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.trellis import values_of
from loram_cli.errors import LoramError


def drawn(low_bit: LowBit, rows: int, columns: int) -> Codes:
    generator = torch.Generator().manual_seed(0)

    def numbers(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator).to(torch.uint8)

    groups = low_bit.groups(columns)
    return Codes(
        numbers(2**low_bit.bits, rows, low_bit.padded(columns)),
        numbers(STEPS[low_bit.codes], rows, groups),
        numbers(16, rows, groups) * (low_bit.codes == "grid"),
        torch.rand(rows, generator=generator).to(torch.float16),
    )


@pytest.mark.parametrize("kind", ["grid", "trellis"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [40, 16, 33])
def test_packing_is_undone_and_takes_the_promised_bytes(bits: int, columns: int, kind: CodeKind):
    low_bit = LowBit(bits, 16, kind)
    codes = drawn(low_bit, 5, columns)
    packed = pack(codes, low_bit)
    assert packed.shape == (5, low_bit.row_bytes(columns))
    assert packed.dtype == torch.uint8
    found = unpack(packed, low_bit, columns)
    for name in ("codes", "step", "zero", "scale"):
        assert torch.equal(getattr(found, name), getattr(codes, name)), name


def test_a_weight_is_code_less_zero_times_step():
    low_bit = LowBit(3, 8)
    codes = drawn(low_bit, 3, 20)
    weight = dequantize(codes, low_bit, 20, torch.float64)
    for row, column in ((0, 0), (1, 9), (2, 19)):
        group = column // 8
        step = float(codes.scale[row]) * 2 ** (-0.12 * int(codes.step[row, group]))
        zero = 3.5 + (int(codes.zero[row, group]) - 8) / 8
        expected = (int(codes.codes[row, column]) - zero) * step
        assert float(weight[row, column]) == pytest.approx(expected, rel=1e-6)


def test_a_weight_on_a_trellis_is_its_value_times_step():
    low_bit = LowBit(2, 8, "trellis")
    codes = drawn(low_bit, 3, 20)
    weight = dequantize(codes, low_bit, 20, torch.float64)
    values = values_of(codes.codes.reshape(3, 3, 8), 2, torch.float64).reshape(3, 24)
    for row, column in ((0, 0), (1, 9), (2, 19)):
        step = float(codes.scale[row]) * 2 ** (-0.03 * int(codes.step[row, column // 8]))
        expected = float(values[row, column]) * step
        assert float(weight[row, column]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("low_bit", [LowBit(3, 16), LowBit(2, 64, "trellis")])
def test_a_config_says_how_weights_are_rounded(low_bit: LowBit):
    said = json.loads(json.dumps({CONFIG_KEY: low_bit.to_mapping()}))
    assert LowBit.of_config(said, "here") == low_bit
    assert ("codes" in said[CONFIG_KEY]) == (low_bit.codes == "trellis")


@pytest.fixture
def rounded(base: Path, tmp_path: Path) -> Path:
    """The base with its decoder linears as drawn rows of bytes."""
    low_bit, config = LowBit(2, 8), read_config(base)
    linears = set(family_for(config, "here").linear_names(config))
    tensors = load_file(base / "model.safetensors")
    for name in linears:
        tensors[name] = pack(drawn(low_bit, *tensors[name].shape), low_bit)
    save_file(tensors, tmp_path / "model.safetensors")
    config[CONFIG_KEY] = low_bit.to_mapping()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_reader_gives_floating_weights_whole_and_by_rows(rounded: Path):
    model = Model.open(rounded)
    name = model.linear_names[0]
    shape = model.shapes[name]
    stored = load_file(rounded / "model.safetensors")[name]
    expected = weight_of(stored, LowBit(2, 8), shape[1], torch.float32)
    with TensorReader(model.index) as reader:
        assert torch.equal(reader.read(name), expected)
        assert torch.equal(reader.read_packed(name), stored)
        rows = [1, shape[0] - 1]
        found = torch.cat([chunk for _, chunk in reader.read_chunks(name, rows)])
        assert torch.equal(found, expected[rows])
    assert model.index.tensors[name].num_bytes == stored.nbytes
    assert model.num_params == Model.open(rounded).index.num_params


@pytest.mark.parametrize(
    "said",
    [
        {"bits": 5, "group_size": 8},
        {"bits": 2, "group_size": 12},
        {"bits": 2, "group_size": 8, "codes": "lattice"},
        {"bits": 2, "group_size": 8, "codes": []},
        {"bits": 2},
        3,
        "2",
    ],
)
def test_a_config_that_cannot_be_is_refused(rounded: Path, said: object):
    config = json.loads((rounded / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps({**config, CONFIG_KEY: said}))
    with pytest.raises(LoramError, match=rf"{CONFIG_KEY} is .*expected bits of 2, 3, 4"):
        _ = Model.open(rounded).index


def test_bytes_that_are_no_weight_of_the_shape_are_refused(rounded: Path):
    config = json.loads((rounded / "config.json").read_text())
    (rounded / "config.json").write_text(
        json.dumps({**config, CONFIG_KEY: {"bits": 3, "group_size": 8}})
    )
    with pytest.raises(LoramError, match=r"3 bits for a weight of .* take U8"):
        _ = Model.open(rounded).index
