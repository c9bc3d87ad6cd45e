"""NaN and infinity in a checkpoint: refused where a tensor is read, by file and name."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from loram_cli.checkpoint.finite import is_finite
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.checkpoint.low_bit import SCALE_BYTES
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_value_among_many_shows(dtype):
    tensor = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    assert is_finite(tensor.t())
    for bad in BAD:
        spoilt = tensor.clone()
        spoilt[31, 7] = bad
        assert not is_finite(spoilt)
        assert not is_finite(spoilt.t())
    both = tensor.clone()
    both[0, 0], both[1, 1] = math.inf, -math.inf
    assert not is_finite(both)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_values_whose_sum_is_too_large_are_numbers(dtype):
    assert is_finite(torch.full((64,), torch.finfo(dtype).max, dtype=dtype))


def test_types_of_one_byte_and_whole_numbers():
    every = torch.arange(256, dtype=torch.uint8)
    for dtype, bad in (
        (torch.float8_e4m3fn, (0x7F, 0xFF)),
        (torch.float8_e5m2, (0x7C, 0x7D, 0xFE)),
        (torch.float8_e8m0fnu, (0xFF,)),
    ):
        assert not is_finite(every.view(dtype))
        for value in bad:
            assert not is_finite(torch.tensor([1, value], dtype=torch.uint8).view(dtype))
        good = [v for v in range(256) if every.view(dtype).float()[v].isfinite()]
        assert is_finite(torch.tensor(good, dtype=torch.uint8).view(dtype))
    assert is_finite(every)
    assert is_finite(torch.empty(0, 4))


@pytest.mark.parametrize("bad", BAD)
def test_every_way_of_reading_names_file_and_tensor(tmp_path, bad):
    tensor = torch.zeros(600, 100)
    tensor[599, 3] = bad
    file = tmp_path / "model.safetensors"
    save_file({"fine": torch.ones(3), "spoilt": tensor}, file)
    said = r"model\.safetensors: tensor spoilt has NaN or infinite values"
    with TensorReader(CheckpointIndex.open(tmp_path)) as reader:
        assert reader.read("fine").tolist() == [1, 1, 1]
        with pytest.raises(LoramError, match=said):
            reader.read("spoilt")
        with pytest.raises(LoramError, match=said):
            list(reader.read_chunks("spoilt"))
        with pytest.raises(LoramError, match=said):
            list(reader.read_chunks("spoilt", [0, 599]))
        # Rows that are not read may be anything.
        assert sum(len(rows) for _, rows in reader.read_chunks("spoilt", [0, 1])) == 2
    with TensorReader(CheckpointIndex.open(tmp_path), finite=False) as reader:
        assert not is_finite(reader.read("spoilt"))


def test_a_scale_of_packed_rows_that_is_no_number(low_bit_copy):
    weights = load_file(low_bit_copy / "model.safetensors")
    name = next(n for n, t in sorted(weights.items()) if t.dtype == torch.uint8)
    weights[name][1, -SCALE_BYTES:] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # infinity
    save_file(weights, low_bit_copy / "model.safetensors")
    with TensorReader(CheckpointIndex.open(low_bit_copy)) as reader:
        for read in (reader.read, reader.read_packed):
            with pytest.raises(LoramError, match=f"tensor {name} has NaN or infinite values"):
                read(name)


@pytest.fixture
def low_bit_copy(base, tmp_path):
    from loram_cli.reporting import NullReporter
    from loram_cli.stages.prune import stage as prune

    out = tmp_path / "low"
    spec = prune.PruneSpec(model=base, out=out, strategy="lowbit", bits=2, importance="nearest")
    prune.run(spec, NullReporter())
    return out
