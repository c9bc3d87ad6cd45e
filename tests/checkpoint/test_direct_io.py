"""Files read and written past the page cache, and how it is done without where that is refused."""

import gc
import hashlib
import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loram_cli.checkpoint import background, reader
from loram_cli.checkpoint import direct_io as unbuffered
from loram_cli.checkpoint.background import WriteBehind
from loram_cli.checkpoint.direct_io import BLOCK_BYTES, BufferPool, block_buffer, is_cached
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError


@pytest.fixture
def always(monkeypatch):
    """Small files too, cached or not."""
    for module in (reader, background):
        monkeypatch.setattr(module, "LEAST_BYTES", 0)
    monkeypatch.setattr(reader, "is_cached", lambda descriptor: False)


def refuse_transfers(monkeypatch):
    """A file system that takes the flag, and refuses what is asked with it."""
    read, write = os.preadv, os.write

    def direct(descriptor):
        return unbuffered.fcntl.fcntl(descriptor, unbuffered.fcntl.F_GETFL) & os.O_DIRECT

    def refuse(descriptor):
        if direct(descriptor):
            raise OSError(22, "Invalid argument")

    def preadv(descriptor, *rest):
        refuse(descriptor)
        return read(descriptor, *rest)

    def plain_write(descriptor, data):
        refuse(descriptor)
        return write(descriptor, data)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "write", plain_write)


def refuse_the_flag(monkeypatch):
    def fcntl(descriptor, command, flags=0):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return 0

    monkeypatch.setattr(unbuffered.fcntl, "fcntl", fcntl)


WORLDS = {
    "as it is": lambda patch: None,
    "refused": refuse_transfers,
    "no flag": refuse_the_flag,
    "no such thing": lambda patch: patch.delattr(os, "O_DIRECT", raising=False),
}


@pytest.fixture(params=WORLDS)
def world(request, monkeypatch, always):
    WORLDS[request.param](monkeypatch)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stored")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # An odd count of bytes first, so that what follows lies across blocks.
        "odd": torch.arange(131, dtype=torch.uint8),
        "wide": torch.randn(97, 1031, generator=generator).bfloat16(),
        "long": torch.randn(5000, 3, generator=generator),
        "one": torch.tensor(7.0),
        "last": torch.arange(11, dtype=torch.int64),
    }
    save_file(tensors, directory / "model.safetensors")
    return CheckpointIndex.open(directory), tensors


def test_what_is_read_is_what_was_stored(stored, world):
    index, tensors = stored
    with TensorReader(index, once=True) as opened:
        for name, tensor in tensors.items():
            assert torch.equal(opened.read(name), tensor)
            if tensor.dim():
                chunks = [rows for _, rows in opened.read_chunks(name, range(3, len(tensor)))]
                assert torch.equal(torch.cat(chunks), tensor[3:])


@given(rows=st.sets(st.integers(0, 96), min_size=1).map(sorted), chunk_bytes=st.integers(1, 60000))
def test_chunks_keep_their_rows_while_buffers_are_used_again(stored, rows, chunk_bytes):
    index, tensors = stored
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("CHUNK_BYTES", chunk_bytes), ("_GAP_BYTES", 3000), ("LEAST_BYTES", 0),
            ("is_cached", lambda _: False),
        ):  # fmt: skip
            patch.setattr(reader, name, value)
        with TensorReader(index, once=True) as opened:
            for wanted in (rows, None):
                chunks = [chunk for _, chunk in opened.read_chunks("wide", wanted)]
                expected = tensors["wide"] if wanted is None else tensors["wide"][wanted]
                assert torch.equal(torch.cat(chunks), expected)


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 10000, 40960])
def test_what_is_written_is_what_was_given(tmp_path, monkeypatch, world, count):
    monkeypatch.setattr(background, "_PIECE_BYTES", 2 * BLOCK_BYTES)
    data = torch.randint(0, 256, (count,), dtype=torch.uint8)
    file = WriteBehind(tmp_path / "f", count)
    for part in data.split(777):
        copied = part.clone()
        file.write(copied)
        copied.zero_()
    digest = file.finish()
    assert (tmp_path / "f").read_bytes() == data.numpy().tobytes()
    assert digest == hashlib.sha256(data.numpy().tobytes()).hexdigest()


def test_a_short_write_is_gone_on_with(tmp_path, monkeypatch, always):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1000]))
    file = WriteBehind(tmp_path / "f", 5000)
    file.write(torch.arange(5000).to(torch.uint8))
    file.finish()
    assert (tmp_path / "f").read_bytes() == bytes(i % 256 for i in range(5000))


def test_a_file_that_shrinks_while_it_is_read(tmp_path, always):
    save_file({"t": torch.zeros(9000)}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 6000)
    with (
        TensorReader(index, once=True) as opened,
        pytest.raises(LoramError, match="ends inside tensor t"),
    ):
        opened.read("t")


def test_a_buffer_comes_back_once_nothing_is_left_of_it():
    pool = BufferPool(5000)
    first = pool.take()
    assert first.numel() == 2 * BLOCK_BYTES
    assert first.data_ptr() % BLOCK_BYTES == 0
    address, view = first.data_ptr(), first[10:20].view(5, 2)
    del first
    gc.collect()
    assert pool.take().data_ptr() != address
    del view
    gc.collect()
    taken = [pool.take() for _ in range(2)]
    assert address in [buffer.data_ptr() for buffer in taken]


@settings(max_examples=20)
@given(st.integers(1, 5 * 2**20))
def test_buffers_begin_at_blocks_and_fill_them(count):
    buffer = block_buffer(count)
    assert buffer.data_ptr() % BLOCK_BYTES == 0
    assert count <= buffer.numel() < count + BLOCK_BYTES
    buffer[-1] = 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="pages cannot be given back here")
def test_pages_in_memory_are_seen(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(2**20))
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())
        assert is_cached(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(opened.fileno()):
            pytest.skip("this file system is memory")


def test_an_empty_file_is_not_cached(tmp_path):
    (tmp_path / "f").touch()
    with (tmp_path / "f").open("rb") as opened:
        assert not is_cached(opened.fileno())


def test_a_limit_of_the_process_is_the_memory_it_has(monkeypatch):
    monkeypatch.setattr(unbuffered, "_CGROUP_LIMITS", ())
    machine = unbuffered.usable_memory_bytes()
    limit = lambda kind: (1000 if kind == resource.RLIMIT_DATA else resource.RLIM_INFINITY, 0)  # noqa: E731
    monkeypatch.setattr(resource, "getrlimit", limit)
    assert unbuffered.usable_memory_bytes() == 1000 < machine
    assert unbuffered.exceeds_cache(501)
    assert not unbuffered.exceeds_cache(500)


def test_a_container_has_what_its_group_may_have(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "none").write_text("max\n")
    files = (str(tmp_path / "none"), str(tmp_path / "memory.max"), str(tmp_path / "absent"))
    monkeypatch.setattr(unbuffered, "_CGROUP_LIMITS", files)
    assert unbuffered.usable_memory_bytes() == 4096


def test_a_checkpoint_larger_than_the_cache_goes_through_it_where_parts_are_read_often(
    stored, always, monkeypatch
):
    index, tensors = stored
    asked = []
    monkeypatch.setattr(reader, "exceeds_cache", lambda _: True)
    monkeypatch.setattr(reader, "stop_buffering", lambda _: asked.append(1))
    for often, times in ((True, 0), (False, 1)):
        with TensorReader(index, often=often) as opened:
            assert torch.equal(opened.read("wide"), tensors["wide"])
        assert len(asked) == times
