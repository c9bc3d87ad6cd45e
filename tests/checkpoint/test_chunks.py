"""Tensors read and written in pieces, and the threads that carry them."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loram_cli.checkpoint import background, reader
from loram_cli.checkpoint.background import WriteBehind, read_ahead
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.errors import LoramError
from loram_cli.runs.digests import file_digest

ROWS = 60


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stored")
    tensors = {
        "matrix": torch.arange(ROWS * 3, dtype=torch.float32).reshape(ROWS, 3).bfloat16(),
        "vector": torch.arange(ROWS),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, directory / "model.safetensors")
    return CheckpointIndex.open(directory), tensors


def raw(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(
    rows=st.none() | st.sets(st.integers(0, ROWS - 1), min_size=1).map(sorted),
    chunk_bytes=st.integers(1, 500),
    gap_bytes=st.integers(0, 100),
)
def test_chunks_joined_are_the_wanted_rows(stored, rows, chunk_bytes, gap_bytes):
    index, tensors = stored
    with pytest.MonkeyPatch.context() as patch, TensorReader(index) as opened:
        patch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(reader, "_GAP_BYTES", gap_bytes)
        for name in ("matrix", "vector"):
            wanted = tensors[name] if rows is None else tensors[name][rows]
            chunks = list(opened.read_chunks(name, rows))
            assert torch.equal(torch.cat([chunk for _, chunk in chunks]), wanted)
            done = 0
            for start, chunk in chunks:
                assert start == done
                done += len(chunk)


def test_scalars_and_empty_tensors_come_whole(stored):
    index, tensors = stored
    with TensorReader(index) as opened:
        for name in ("scalar", "empty"):
            ((start, tensor),) = opened.read_chunks(name)
            assert start == 0
            assert torch.equal(tensor, tensors[name])


def test_pieces_are_written_as_one_tensor(stored, tmp_path):
    _, tensors = stored
    plan = {name: TensorPlan(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardedWriter(tmp_path, plan, max_shard_bytes=300) as writer:
        for name, tensor in tensors.items():
            for rows in tensor.split(7) if tensor.numel() > 1 else [tensor]:
                writer.write(name, rows)
    found = {}
    for shard in tmp_path.glob("*.safetensors"):
        found.update(load_file(shard))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("rows", [torch.zeros(5, 2), torch.zeros(2, 3), torch.zeros(2, 2).int()])
def test_rows_beside_the_plan_are_a_defect(tmp_path, rows):
    plan = {"t": TensorPlan(torch.float32, (4, 2))}
    with (
        pytest.raises(RuntimeError, match="does not match the plan"),
        ShardedWriter(tmp_path, plan) as writer,
    ):
        writer.write("t", rows)


def test_a_tensor_left_half_written_is_a_defect(tmp_path):
    with (
        pytest.raises(RuntimeError, match="never written: t"),
        ShardedWriter(tmp_path, {"t": TensorPlan(torch.float32, (4, 2))}) as writer,
    ):
        writer.write("t", torch.zeros(3, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_value_that_is_not_finite_is_refused(tmp_path, bad, dtype):
    tensor = torch.zeros(40, 50, dtype=dtype)
    tensor[17, 23] = bad
    with (
        pytest.raises(LoramError, match="tensor t has NaN or infinite values"),
        ShardedWriter(tmp_path, {"t": TensorPlan(dtype, (40, 50))}) as writer,
    ):
        writer.write("t", tensor)


def test_what_the_reading_thread_raises_reaches_the_user():
    def items():
        yield 1
        raise LoramError("shard ends early")

    seen = []
    with pytest.raises(LoramError, match="ends early"), read_ahead(items()) as ahead:
        seen.extend(ahead)
    assert seen == [1] or seen == []


def test_threads_end_with_their_work(tmp_path):
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), read_ahead(iter(range(10**9))) as ahead:
        next(ahead)
        raise KeyboardInterrupt
    file = WriteBehind(tmp_path / "f", 3)
    file.write(raw(b"abc"))
    file.finish()
    assert (tmp_path / "f").read_bytes() == b"abc"
    assert threading.active_count() == before


def test_flushes_on_the_way_keep_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "_UNSYNCED_BYTES", 10)
    monkeypatch.setattr(background, "_PIECE_BYTES", 16)
    file = WriteBehind(tmp_path / "f", 700)
    for i in range(100):
        file.write(raw(bytes([i]) * 7))
    file.finish()
    assert (tmp_path / "f").read_bytes() == b"".join(bytes([i]) * 7 for i in range(100))


def test_a_failed_write_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(background.os, "write", full)
    with (
        pytest.raises(LoramError, match=r"cannot write \(No space left on device\)"),
        ShardedWriter(tmp_path, {"t": TensorPlan(torch.float32, (4,))}) as writer,
    ):
        writer.write("t", torch.zeros(4))
    monkeypatch.undo()


def test_shards_are_hashed_while_they_are_written(tmp_path):
    tensors = {f"t{i}": torch.randn(40, 50) for i in range(3)}
    plan = {name: TensorPlan(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardedWriter(tmp_path, plan, max_shard_bytes=10_000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    shards = {file.name: file for file in tmp_path.glob("*.safetensors")}
    assert len(shards) == 3
    assert {n: f"sha256:{d}" for n, d in writer.digests.items()} == {
        name: file_digest(file) for name, file in shards.items()
    }
