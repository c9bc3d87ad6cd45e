import random
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from helpers.gguf_files import make_model, write_gguf

from loram_cli.errors import LoramError
from loram_cli.export.gguf_file import GgufFile


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(make_model(folder / "model"), folder / "model.gguf", Type.Q4_0)


def test_the_header_says_what_the_packages_reader_says(gguf):
    mine, theirs = GgufFile.open(gguf), GGUFReader(gguf)
    assert [*mine.fields] == [k for k in theirs.fields if not k.startswith("GGUF.")]
    for key, field in mine.fields.items():
        assert field.kind == theirs.fields[key].types[0]
        if field.value is not None:
            value = theirs.fields[key].contents()
            assert field.value == (tuple(value) if isinstance(value, list) else value)
    assert mine.value("test.numbers") == (1, 2, 3)
    assert mine.fields["tokenizer.ggml.tokens"].value is None
    assert [*mine.tensors] == [t.name for t in theirs.tensors]
    for tensor, other in zip(mine.tensors.values(), theirs.tensors, strict=True):
        assert tensor.kind == other.tensor_type
        assert list(tensor.shape[::-1]) == other.shape.tolist()
        assert (tensor.offset_bytes, tensor.num_bytes) == (other.data_offset, other.n_bytes)


def test_rows_are_the_tensors_bytes(gguf, monkeypatch):
    monkeypatch.setattr("loram_cli.export.gguf_file.CHUNK_ELEMENTS", 640)
    file = GgufFile.open(gguf)
    tensor = file.tensors["blk.1.ffn_up.weight"]
    starts, parts = zip(*file.read_rows(tensor), strict=True)
    assert starts == tuple(range(0, 96, 10))
    raw = gguf.read_bytes()[tensor.offset_bytes :][: tensor.num_bytes]
    assert np.concatenate(parts).tobytes() == raw


def test_a_damaged_file_is_an_error_and_never_hangs(gguf, tmp_path):
    raw, draw = gguf.read_bytes(), random.Random(0)
    header_bytes = GgufFile.open(gguf).tensors["token_embd.weight"].offset_bytes
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(200):
        at = draw.randrange(header_bytes)
        changed = bytearray(raw)
        changed[at] ^= 1 << draw.randrange(8)
        damaged.write_bytes(changed)
        try:
            GgufFile.open(damaged)
        except LoramError as error:
            assert str(damaged) in error.message
            refused += 1
    assert refused > 20
    for length in (0, 3, 30, header_bytes // 2, len(raw) - 1):
        damaged.write_bytes(raw[:length])
        with pytest.raises(LoramError, match=r"not a GGUF file|ends within|truncated"):
            GgufFile.open(damaged)


@pytest.mark.parametrize(
    ("version", "order"), [(1, "<"), (4, "<"), (3, ">")], ids=["old", "new", "big-endian"]
)
def test_other_versions_are_refused(gguf, tmp_path, version, order):
    raw = gguf.read_bytes()
    (tmp_path / "other.gguf").write_bytes(raw[:4] + struct.pack(f"{order}I", version) + raw[8:])
    with pytest.raises(LoramError, match="unknown GGUF version"):
        GgufFile.open(tmp_path / "other.gguf")
