import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from safetensors.torch import load_file, save_file

from loram_cli.checkpoint.index import INDEX_NAME, CheckpointIndex, read_config
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.errors import LoramError


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def test_reads_what_safetensors_reads(base: Path):
    expected = load_file(base / "model.safetensors")
    index = CheckpointIndex.open(base)
    assert set(index.tensors) == set(expected)
    with TensorReader(index) as reader:
        for name, tensor in expected.items():
            assert torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize("max_shard_bytes", [64, 3000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_writes_what_safetensors_reads(tmp_path: Path, max_shard_bytes: int, dtype: torch.dtype):
    tensors = {f"t{i}": torch.randint(0, 100, (i + 1, 7)).to(dtype) for i in range(9)}
    plan = {name: TensorPlan(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardedWriter(tmp_path, plan, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = {}
    for shard in tmp_path.glob("*.safetensors"):
        found.update(load_file(shard))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert set(CheckpointIndex.open(tmp_path).tensors) == set(tensors)


def test_refuses_nan_on_the_way_out(tmp_path: Path):
    tensor = torch.tensor([1.0, float("nan")])
    with (
        pytest.raises(LoramError, match="tensor bad has NaN"),
        ShardedWriter(tmp_path, {"bad": TensorPlan(torch.float32, (2,))}) as writer,
    ):
        writer.write("bad", tensor)


def test_truncated_shard(copy: Path):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoramError, match=r"model\.safetensors: truncated"):
        CheckpointIndex.open(copy)


@pytest.mark.parametrize(
    "content", [b"", b"12", b"\xff" * 64, (5).to_bytes(8, "little") + b"{bad}"]
)
def test_broken_header(copy: Path, content: bytes):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(LoramError, match="safetensors"):
        CheckpointIndex.open(copy)


def test_missing_shard_and_escape(copy: Path):
    (copy / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(LoramError, match=r"gone\.safetensors: shard cannot be read"):
        CheckpointIndex.open(copy)
    (copy / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(LoramError, match="outside the directory"):
        CheckpointIndex.open(copy)


def test_pickles_are_refused(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LoramError, match="pickled weights"):
        CheckpointIndex.open(tmp_path)


def test_config_that_is_not_json(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoramError, match="not valid JSON"):
        read_config(tmp_path)


def test_identity_tells_models_apart(base: Path, copy: Path, tmp_path: Path):
    assert Model.open(base).identity == Model.open(copy).identity
    other = Model.open(make_base(tmp_path / "other", seed=1)).identity
    assert other.tensors == Model.open(base).identity.tensors
    assert other.weights != Model.open(base).identity.weights
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert Model.open(copy).identity.weights != Model.open(base).identity.weights
