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
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from loram_cli.errors import LoramError

MAX_HEADER_BYTES = 100_000_000
COPY_AGAIN = "copy or download the checkpoint again"

# All types of the format that take whole bytes; the smaller ones (F4, F6) have no tensor in torch
# whose shape is the header's.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes lie.

    Attributes:
        name: Tensor name.
        dtype: Element type.
        shape: Dimensions.
        file: The shard.
        offset_bytes: First byte, from the start of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset_bytes: int

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
