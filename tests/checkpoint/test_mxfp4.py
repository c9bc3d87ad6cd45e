"""Experts in MXFP4: the numbers, how they are read, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.mxfp4_files import drawn, save_twins
from safetensors.torch import load_file, save_file

from loram_cli.checkpoint.index import CheckpointIndex, read_config
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.mxfp4_codes import dequantize
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError

GATE = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_are_those_of_transformers(dtype: torch.dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = drawn(3, 24, 5)
    scales[0, 0] = torch.tensor([0, 100, 127, 180, 250], dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    found = torch.stack([dequantize(blocks[i], scales[i], dtype).T for i in range(3)])
    assert torch.equal(found, expected)


def test_codes_by_hand():
    # 0x72: 1 in the lower half, 6 in the upper one; 0xA9: -0.5, then -1.
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, :2] = torch.tensor([0x72, 0xA9])
    found = dequantize(blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32)
    assert found.shape == (1, 32)
    assert found[0, :5].tolist() == [2.0, 12.0, -1.0, -2.0, 0.0]


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    return save_twins(tmp_path_factory.mktemp("mxfp4"))


def test_experts_are_read_as_the_floating_numbers_that_they_stand_for(twins):
    packed, plain = map(Model.open, twins)
    assert packed.config == plain.config
    assert packed.shapes == plain.shapes
    with TensorReader(packed.index) as mine, TensorReader(plain.index) as theirs:
        for name in packed.index.tensors:
            assert torch.equal(mine.read(name), theirs.read(name)), name
        some = torch.cat([rows for _, rows in mine.read_chunks(GATE, [1, 4])])
        assert torch.equal(some, theirs.read(GATE)[[1, 4]])


def test_the_identity_follows_the_stored_bytes(twins, tmp_path: Path):
    packed, _ = twins
    before = Model.open(packed).identity
    other = tmp_path / "other"
    other.mkdir()
    for file in packed.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert Model.open(other).identity == before
    weights = load_file(other / "model.safetensors")
    weights[f"{GATE}_scales"][0, 0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert Model.open(other).identity != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(f"{GATE}_scales"), "gate_up_proj_scales is missing from the weights"),
        (lambda w: w.pop(f"{GATE}_blocks"), "gate_up_proj_blocks is missing from the weights"),
        (lambda w: w.update({f"{GATE}_scales": w[f"{GATE}_scales"][:, 1:]}), "are no weight in"),
    ],
)
def test_a_broken_pair_is_named(change, said: str, twins, tmp_path: Path):
    weights = load_file(twins[0] / "model.safetensors")
    change(weights)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((twins[0] / "config.json").read_bytes())
    with pytest.raises(LoramError, match=said):
        CheckpointIndex.open(tmp_path)


def test_other_families_and_formats_stay_refused(twins, tmp_path: Path):
    config = json.loads((twins[0] / "config.json").read_text())
    for change in ({"model_type": "mixtral"}, {"quantization_config": {"quant_method": "awq"}}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert "quantization_config" in read_config(tmp_path)
        with pytest.raises(LoramError, match="says that the weights are quantized"):
            Model.open(tmp_path)


def test_an_exponent_that_is_no_number_is_named(twins, tmp_path: Path):
    packed = Path(shutil.copytree(twins[0], tmp_path / "packed"))
    weights = load_file(packed / "model.safetensors")
    weights[f"{GATE}_scales"][0, 0, 0] = 255
    save_file(weights, packed / "model.safetensors")
    with (
        TensorReader(CheckpointIndex.open(packed)) as reader,
        pytest.raises(LoramError, match=f"tensor {GATE} has NaN or infinite values"),
    ):
        reader.read(GATE)
