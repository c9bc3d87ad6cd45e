"""Outputs that are one file."""

import os

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.output_file import whole_file


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out.gguf"
    with pytest.raises(RuntimeError), whole_file(out) as file:
        file.write(b"half")
        raise RuntimeError
    assert not any(out.parent.iterdir())
    with whole_file(out) as file:
        file.write(b"all")
        assert not out.exists()
    assert out.read_bytes() == b"all"
    with pytest.raises(UsageError, match="exists"), whole_file(out):
        raise AssertionError("opened")
    with whole_file(out, replace=True) as file:
        file.write(b"new")
    assert [p.name for p in out.parent.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == b"new"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x.gguf"
    with pytest.raises(LoramError, match=r"x\.gguf: cannot write"), whole_file(out):
        raise AssertionError("opened")


def test_a_pipe_is_written_as_it_is(tmp_path):
    out = tmp_path / "pipe"
    os.mkfifo(out)
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with whole_file(out, replace=True) as file:
            file.write(b"page")
        assert os.read(reader, 10) == b"page"
    finally:
        os.close(reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
