"""The header of one safetensors file: which tensor lies where in it.

Parsed here, not by ``safetensors.safe_open``, because a memory-mapped file counts against resident
memory, and because every offset must be checked before the first tensor is read. What the format
forbids is refused here as it is there: safetensors' README, "Format", and its ``validate``.
"""

import json
import math
import operator
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import LoramError

MAX_HEADER_BYTES = 100_000_000
COPY_AGAIN = "copy or download the checkpoint again"

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """An element type of the format, known without importing torch.

    Attributes:
        name: In safetensors, such as ``BF16``.
        torch_name: In torch, such as ``bfloat16``.
        itemsize: Bytes of an element.
        is_floating_point: Whether it holds real numbers, as torch's property of that name.
    """

    name: str
    torch_name: str
    itemsize: int
    is_floating_point: bool = False

    def to_torch(self) -> "torch.dtype":
        """The same type in torch."""
        import torch

        return getattr(torch, self.torch_name)


# All types of the format that take whole bytes; the smaller ones (F4, F6) have no tensor in torch
# whose shape is the header's.
DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("F64", "float64", 8, is_floating_point=True),
        DType("F32", "float32", 4, is_floating_point=True),
        DType("F16", "float16", 2, is_floating_point=True),
        DType("BF16", "bfloat16", 2, is_floating_point=True),
        DType("F8_E4M3", "float8_e4m3fn", 1, is_floating_point=True),
        DType("F8_E5M2", "float8_e5m2", 1, is_floating_point=True),
        DType("F8_E8M0", "float8_e8m0fnu", 1, is_floating_point=True),
        DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 1, is_floating_point=True),
        DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 1, is_floating_point=True),
        DType("C64", "complex64", 8),
        DType("I64", "int64", 8),
        DType("I32", "int32", 4),
        DType("I16", "int16", 2),
        DType("I8", "int8", 1),
        DType("U64", "uint64", 8),
        DType("U32", "uint32", 4),
        DType("U16", "uint16", 2),
        DType("U8", "uint8", 1),
        DType("BOOL", "bool", 1),
    )
}


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that a file holds under a name of their own.

    Attributes:
        name: In the file; a ``*`` stands for the index along the tensor's first axis.
        rows: How many, along the axis after the indexed one; all of a tensor that is only renamed.
    """

    name: str
    rows: int


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes lie.

    Attributes:
        name: Tensor name.
        dtype: Element type.
        shape: Dimensions.
        file: The shard; the first part's where a tensor is stored in parts.
        offset_bytes: First byte, from the start of the file.
        pieces: What the file holds in its place: the pieces of each index of the first axis. Empty
            for a tensor that is stored under its own name.
        parts: The stored tensors, by index and piece; empty for a tensor that is stored whole.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset_bytes: int
    pieces: tuple[Piece, ...] = ()
    parts: tuple[tuple["TensorEntry", ...], ...] = field(default=(), repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> list[TensorEntry]:
    """Parse one safetensors header and check it against the file's length.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        LoramError: The file is absent, truncated, or its header is not sound.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise LoramError(f"{file}: is no regular file", COPY_AGAIN)
        file_bytes = found.st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise LoramError(f"{file}: truncated, or not a safetensors file", COPY_AGAIN)
            header = _parse(stream.read(header_bytes))
    except OSError as error:
        raise LoramError(f"{file}: shard cannot be read ({error.strerror})", COPY_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise LoramError(
            f"{file}: the safetensors header is not JSON ({str(error)[:80]})", COPY_AGAIN
        ) from error
    if not isinstance(header, dict):
        raise LoramError(f"{file}: the safetensors header is not a mapping", COPY_AGAIN)
    if not _is_metadata(header.pop("__metadata__", None)):
        raise LoramError(f"{file}: __metadata__ of the header is no mapping of texts", COPY_AGAIN)
    data_start = 8 + header_bytes
    entries = [_entry(file, name, info, data_start) for name, info in header.items()]
    # An empty tensor lies where another one begins, and goes before it.
    entries.sort(key=lambda entry: (entry.offset_bytes, entry.num_bytes))
    _check_cover(file, entries, data_start, file_bytes)
    return entries


def _parse(data: bytes) -> Any:
    """JSON as the format has it: UTF-8 and nothing else, no key twice, no NaN, no lone surrogate.

    Raises:
        ValueError: It is something else; Python's own parser would take all of these.
    """
    return json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_once,
        parse_constant=_refuse_constant,
        # "-0" is the one negative number that would pass for an offset.
        parse_int=lambda text: -1 if text == "-0" else int(text),
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()
        if key in found:
            raise ValueError(f"{key} stands in it twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _is_metadata(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    )


def _entry(file: Path, name: str, info: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        sound = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
        sound = sound and _is_countable(shape)
    except (TypeError, KeyError, ValueError) as error:
        raise LoramError(f"{file}: the header entry of {name} is malformed", COPY_AGAIN) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise LoramError(f"{file}: tensor {name} has the unsupported type {str(dtype)[:40]!r}")
    if sound:
        entry = TensorEntry(name, DTYPES[dtype], tuple(shape), file, data_start + begin)
        if end - begin == entry.num_bytes:
            return entry
    raise LoramError(f"{file}: the header entry of {name} does not add up", COPY_AGAIN)


def _is_countable(shape: Sequence[int]) -> bool:
    """Whether 64 bits hold the elements, and the strides: of an empty tensor they may not."""
    strides = math.prod(max(n, 1) for n in shape[1:])
    return strides < 2**63 and all(n < 2**64 for n in accumulate(shape, operator.mul))


def _check_cover(
    file: Path, entries: Sequence[TensorEntry], data_start: int, file_bytes: int
) -> None:
    """The tensors lie one after the other, and fill the file: nothing may hide in between."""
    end = data_start
    for entry in entries:
        if entry.offset_bytes < end:
            raise LoramError(f"{file}: tensor {entry.name} overlaps another", COPY_AGAIN)
        if entry.offset_bytes > end:
            raise LoramError(f"{file}: there is a hole before tensor {entry.name}", COPY_AGAIN)
        end = entry.offset_bytes + entry.num_bytes
    if end > file_bytes:
        raise LoramError(
            f"{file}: truncated: {file_bytes} bytes, its header promises {end}", COPY_AGAIN
        )
    if end < file_bytes:
        raise LoramError(
            f"{file}: {file_bytes} bytes, {file_bytes - end} more than its header tells of",
            COPY_AGAIN,
        )
