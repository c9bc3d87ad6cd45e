"""GGUF files: the header read strictly, tensors some rows at a time, and a copy with changes.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: magic, version,
the numbers of tensors and of metadata entries, the metadata, one record per tensor, padding, and
the tensors' bytes, each one aligned. The package's own reader makes an array of every string of
the vocabulary and does not stop at the end of a damaged file; this one skips what it need not know.
"""

import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import quant_shape_to_byte_shape

from loram_cli.errors import LoramError
from loram_cli.units import MIB

COPY_AGAIN = "download or copy the file again"
_HEAD = struct.Struct("<IIQQ")
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
# A layer's widths come as an array of this many numbers at most; longer ones are the vocabulary's.
_MAX_ARRAY = 4096
_MAX_DIMS = 4
# Elements of a weight held at once, in float32 and in a few copies of that size.
CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class GgufField:
    """One metadata entry.

    Attributes:
        kind: Its type.
        offset_bytes: Where its value lies in the file.
        value: The number, text, or tuple of numbers; None for arrays of texts and long arrays.
    """

    kind: GGUFValueType
    offset_bytes: int
    value: Any


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Attributes:
        name: Such as ``blk.0.attn_q.weight``.
        kind: Its type, which may pack blocks of a row's elements.
        shape: Slowest axis first, as in PyTorch (the file has it the other way round).
        offset_bytes: From the file's start.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_bytes(self.shape, self.kind)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header.

    Attributes:
        path: The file.
        version: Of the format, 2 or 3.
        fields: Metadata by key.
        tensors: By name, in the file's order.
        metadata_end: Where the metadata ends and the records of the tensors begin.
    """

    path: Path
    version: int
    fields: Mapping[str, GgufField]
    tensors: Mapping[str, GgufTensor]
    metadata_end: int

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read the header and check that the file holds every tensor.

        Raises:
            LoramError: Not a whole GGUF file that this program can read.
        """
        try:
            # A pipe would be waited for, and a device may have no end.
            if not stat.S_ISREG(path.stat().st_mode):
                raise LoramError(f"{path}: is no regular file")
            with path.open("rb") as file:
                return _read_header(path, _Cursor(path, file, os.fstat(file.fileno()).st_size))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LoramError(f"{path}: cannot read ({reason})") from error

    @cached_property
    def alignment(self) -> int:
        """Bytes to a multiple of which each tensor is aligned."""
        return int(self.value("general.alignment", GGUF_DEFAULT_ALIGNMENT))

    @property
    def architecture(self) -> str:
        """The value of ``general.architecture``."""
        return str(self.value("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a metadata entry, or the default if there is none."""
        return self.fields[key].value if key in self.fields else default

    def hyperparameter(self, key: str, default: Any = None) -> Any:
        """The value of ``ARCHITECTURE.key``.

        Raises:
            LoramError: It is absent and there is no default.
        """
        value = self.value(f"{self.architecture}.{key}", default)
        if value is None:
            raise LoramError(f"{self.path}: no {self.architecture}.{key} in its metadata")
        return value

    def read_rows(self, tensor: GgufTensor) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor's rows as stored, about :data:`CHUNK_ELEMENTS` elements at a time.

        Yields:
            The first row's index, and bytes of shape (n, bytes of a row).

        Raises:
            LoramError: The file ends early.
        """
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.num_bytes // rows
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        with self.path.open("rb") as file:
            file.seek(tensor.offset_bytes)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise LoramError(f"{self.path}: ends within tensor {tensor.name}", COPY_AGAIN)
                yield start, np.frombuffer(data, np.uint8).reshape(count, row_bytes)

    def copy_bytes(self, tensor: GgufTensor, out: BinaryIO) -> None:
        """Copy the tensor's bytes as they are.

        Raises:
            LoramError: The file ends early.
        """
        left = tensor.num_bytes
        with self.path.open("rb") as file:
            file.seek(tensor.offset_bytes)
            while left:
                data = file.read(min(left, 4 * MIB))
                if not data:
                    raise LoramError(f"{self.path}: ends within tensor {tensor.name}", COPY_AGAIN)
                out.write(data)
                left -= len(data)

    def metadata(self) -> bytes:
        """The metadata's bytes, all of them."""
        with self.path.open("rb") as file:
            file.seek(_HEAD.size)
            return file.read(self.metadata_end - _HEAD.size)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a file to be written: its name, type and shape."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_bytes(self.shape, self.kind)


def tensor_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor whose last axis is a multiple of the type's block."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


def padding(offset_bytes: int, alignment: int) -> int:
    """Bytes from an offset to the next aligned one."""
    return -offset_bytes % alignment


def write_header(
    out: BinaryIO,
    version: int,
    metadata: bytes,
    entries: int,
    tensors: list[PlannedTensor],
    alignment: int,
) -> None:
    """Write everything before the first tensor's bytes.

    Args:
        out: An empty file.
        version: Of the format.
        metadata: Encoded entries.
        entries: How many these are.
        tensors: In the order in which their bytes follow.
        alignment: As the metadata states it.
    """
    out.write(_HEAD.pack(GGUF_MAGIC, version, len(tensors), entries))
    out.write(metadata)
    offset = 0
    for tensor in tensors:
        name, dims = tensor.name.encode(), tensor.shape[::-1]
        out.write(struct.pack("<Q", len(name)) + name)
        out.write(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        out.write(struct.pack("<IQ", tensor.kind, offset))
        offset += tensor.num_bytes + padding(tensor.num_bytes, alignment)
    out.write(bytes(padding(out.tell(), alignment)))


class _Cursor:
    """Reads a header forward and knows where the file ends."""

    def __init__(self, path: Path, file: BinaryIO, num_bytes: int) -> None:
        self.path, self._file, self.num_bytes = path, file, num_bytes
        self.offset = 0

    def take(self, count: int) -> bytes:
        self._check(count)
        self.offset += count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._check(count)
        self.offset += count
        self._file.seek(self.offset)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def number(self, layout: str) -> Any:
        return self.unpack(layout)[0]

    def text(self) -> str:
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError as error:
            raise LoramError(f"{self.path}: text is not UTF-8", COPY_AGAIN) from error

    def _check(self, count: int) -> None:
        if count > self.num_bytes - self.offset:
            raise LoramError(f"{self.path}: ends within its header", COPY_AGAIN)


def _read_header(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.num_bytes < _HEAD.size:
        raise LoramError(f"{path}: not a GGUF file")
    magic, version, tensor_count, field_count = cursor.unpack(_HEAD.format)
    if magic != GGUF_MAGIC:
        raise LoramError(f"{path}: not a GGUF file")
    if version not in (2, 3):
        hint = "big-endian and version 1 files are not supported; convert the model again"
        raise LoramError(f"{path}: unknown GGUF version {version}", hint)
    fields: dict[str, GgufField] = {}
    for _ in range(field_count):
        key = cursor.text()
        if key in fields:
            raise LoramError(f"{path}: metadata key {key} appears twice", COPY_AGAIN)
        fields[key] = _read_field(cursor, key)
    metadata_end = cursor.offset
    records = [_read_record(cursor) for _ in range(tensor_count)]
    alignment = fields["general.alignment"].value if "general.alignment" in fields else None
    alignment = GGUF_DEFAULT_ALIGNMENT if alignment is None else alignment
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise LoramError(f"{path}: general.alignment is {alignment}, expected a power of two")
    start = cursor.offset + padding(cursor.offset, alignment)
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in records:
        tensor = GgufTensor(name, kind, shape, start + offset)
        if name in tensors:
            raise LoramError(f"{path}: tensor {name} appears twice", COPY_AGAIN)
        if tensor.offset_bytes + tensor.num_bytes > cursor.num_bytes:
            raise LoramError(f"{path}: truncated: it ends before tensor {name} does", COPY_AGAIN)
        tensors[name] = tensor
    return GgufFile(path, version, fields, tensors, metadata_end)


def _read_field(cursor: _Cursor, key: str) -> GgufField:
    kind = _value_type(cursor, key)
    offset = cursor.offset
    if kind is GGUFValueType.STRING:
        return GgufField(kind, offset, cursor.text())
    if kind in _SCALARS:
        return GgufField(kind, offset, cursor.number(_SCALARS[kind]))
    return GgufField(kind, offset, _read_array(cursor, key))


def _read_array(cursor: _Cursor, key: str) -> tuple[Any, ...] | None:
    kind, count = _value_type(cursor, key), cursor.number("<Q")
    if kind in _SCALARS:
        layout = _SCALARS[kind][1:]
        if count > _MAX_ARRAY:
            cursor.skip(count * struct.calcsize(f"<{layout}"))
            return None
        return cursor.unpack(f"<{count}{layout}")
    for _ in range(count):
        if kind is GGUFValueType.STRING:
            cursor.skip(cursor.number("<Q"))
        else:
            raise LoramError(f"{cursor.path}: metadata {key} is an array of arrays")
    return None


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.number("<I")
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise LoramError(f"{cursor.path}: metadata {key} has unknown type {number}") from error


def _read_record(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.text()
    count = cursor.number("<I")
    if not 0 < count <= _MAX_DIMS:
        raise LoramError(f"{cursor.path}: tensor {name} has {count} axes", COPY_AGAIN)
    shape = cursor.unpack(f"<{count}Q")[::-1]
    number, offset = cursor.unpack("<IQ")
    try:
        kind = GGMLQuantizationType(number)
        quant_shape_to_byte_shape(shape, kind)
    except (ValueError, KeyError) as error:
        raise LoramError(
            f"{cursor.path}: tensor {name} has unknown type {number} or does not fit it: {shape}",
            "a newer gguf package may know it: pip install -U gguf",
        ) from error
    if 0 in shape:
        raise LoramError(f"{cursor.path}: tensor {name} is empty", COPY_AGAIN)
    return name, kind, shape, offset
