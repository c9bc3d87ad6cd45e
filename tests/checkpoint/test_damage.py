"""Checkpoints that lie: each is told in one line that names the file or the tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loram_cli.checkpoint.index import INDEX_NAME, CheckpointIndex
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import LoraAdapter, LoraPair, read_shapes
from loram_cli.reporting import NullReporter
from loram_cli.stages.prune import stage as prune

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_header(directory: Path, header: object, data: bytes = bytes(16)) -> None:
    text = json.dumps(header).encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "not a mapping"),
        ({"t": 3}, "entry of t is malformed"),
        ({"t": {**ENTRY, "data_offsets": [0]}}, "entry of t is malformed"),
        ({"t": {**ENTRY, "shape": [3]}}, "entry of t does not add up"),
        ({"t": {**ENTRY, "shape": [-2]}}, "entry of t does not add up"),
        ({"t": {**ENTRY, "shape": [2.0]}}, "entry of t does not add up"),
        ({"t": {**ENTRY, "data_offsets": [8, 0]}}, "entry of t does not add up"),
        ({"t": {**ENTRY, "dtype": "F12"}}, "unsupported type 'F12'"),
        ({"t": {**ENTRY, "dtype": ["F32"]}}, "tensor t has the unsupported type"),
        ({"t": ENTRY, "u": {**ENTRY, "data_offsets": [4, 12]}}, "u overlaps another"),
        ({"t": {**ENTRY, "data_offsets": [16, 24]}}, "a hole before tensor t"),
        ({"t": {**ENTRY, "shape": [100], "data_offsets": [0, 400]}}, "truncated"),
        ({"t": {**ENTRY, "shape": [2**62, 2], "data_offsets": [0, 2**65]}}, "does not add up"),
        ({"t": {**ENTRY, "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}, "does not add up"),
        ({"t\n\x1b[2J": 3}, r"entry of t\\n\\x1b\[2J is malformed"),
        ({"t": ENTRY}, "8 more than its header tells of"),
        ({"t": ENTRY, "__metadata__": {"format": 1}}, "__metadata__ of the header"),
    ],
)
def test_a_header_that_lies(tmp_path, header, message):
    write_header(tmp_path, header)
    with pytest.raises(LoramError, match=message) as caught:
        CheckpointIndex.open(tmp_path)
    assert "model.safetensors" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"t": "gone.safetensors"}, r"gone\.safetensors: shard cannot be read"),
        ({"t": "../model.safetensors"}, "lies outside the directory"),
        ({"t": "/etc/passwd"}, "lies outside the directory"),
        ({"t": "sub/model.safetensors"}, "lies outside the directory"),
        ({"t": ".."}, "model.safetensors.index.json|cannot be read|outside"),
        ({"t": 3}, "lies outside the directory"),
        ({"t": "model.safetensors", "u": "model.safetensors"}, "tensor u is missing"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_lies(tmp_path, weight_map, message):
    write_header(tmp_path, {"t": ENTRY}, bytes(8))
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(LoramError, match=message) as caught:
        CheckpointIndex.open(tmp_path)
    assert "\n" not in caught.value.message


def test_a_shard_that_shrinks_while_it_is_read(tmp_path):
    save_file({"t": torch.zeros(1000)}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    with (
        TensorReader(index) as reader,
        pytest.raises(LoramError, match=r"model\.safetensors: ends inside tensor t"),
    ):
        list(reader.read_chunks("t"))


def test_a_shard_that_is_gone_before_it_is_read(tmp_path):
    save_file({"t": torch.zeros(10)}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with (
        TensorReader(index) as reader,
        pytest.raises(LoramError, match=r"model\.safetensors: cannot be read"),
    ):
        reader.read("t")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(base, tmp_path, bad):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 4] = bad
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    spec = prune.PruneSpec(
        model=copy, out=tmp_path / "out", strategy="rand", keep_first=1, keep_last=1
    )
    with pytest.raises(LoramError, match=f"tensor {name} has NaN or infinite values"):
        prune.run(spec, NullReporter())
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


@pytest.mark.parametrize("wrong", ["only_a", "ranks", "name"])
def test_adapter_factors_that_do_not_match(tmp_path, wrong):
    LoraAdapter({}, {"m": LoraPair(torch.zeros(2, 4), torch.zeros(6, 2))}).write(tmp_path)
    assert read_shapes(tmp_path) == {"m": (6, 4, 2)}
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    a, b = sorted(tensors)
    if wrong == "only_a":
        del tensors[b]
    elif wrong == "ranks":
        tensors[b] = torch.zeros(6, 3)
    else:
        tensors["other"] = tensors[a].clone()
    save_file(tensors, file)
    with pytest.raises(LoramError, match=r"do not match|is not a LoRA factor"):
        read_shapes(tmp_path)
