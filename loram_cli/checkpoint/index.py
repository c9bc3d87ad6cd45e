"""Which tensor lies where: an index over a directory's safetensors shards.

Headers are parsed here, not by ``safetensors.safe_open``, because a memory-mapped file counts
against resident memory, and because every offset must be checked before the first tensor is read.
"""

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.widths import check_required, check_widths
from loram_cli.errors import LoramError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a directory, in the order of their shards and offsets."""

    directory: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, directory: Path) -> "CheckpointIndex":
        """Read and check the headers of every shard; no tensor is read.

        Args:
            directory: A Hugging Face model directory with safetensors weights.

        Raises:
            LoramError: No safetensors, a missing or truncated shard, a header that lies, an index
                that disagrees with its shards or names a path outside the directory.
        """
        tensors: dict[str, TensorEntry] = {}
        weight_map = _weight_map(directory)
        for shard_name in sorted(set(weight_map.values())) if weight_map else [SINGLE_NAME]:
            for entry in read_header(directory / shard_name):
                if entry.name in tensors:
                    raise LoramError(f"{directory}: tensor {entry.name} stands in two shards")
                tensors[entry.name] = entry
        for name, shard_name in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard_name:
                raise LoramError(
                    f"{directory / shard_name}: tensor {name} is missing from the shard"
                )
        return cls(directory, tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def num_params(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], ignored: Any) -> None:
        """Compare with the shapes that the config promises.

        Args:
            expected: Shape by tensor name.
            ignored: Predicate on names that may stand in the file without being expected.

        Raises:
            LoramError: A tensor is missing, unexpected or of another shape.
        """
        for name, shape in expected.items():
            entry = self.tensors.get(name)
            if entry is None:
                raise LoramError(f"{self.directory}: tensor {name} is missing from the weights")
            if entry.shape != shape:
                raise LoramError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, "
                    f"config.json asks for {list(shape)}"
                )
        for name in self.tensors:
            if name not in expected and not ignored(name):
                raise LoramError(
                    f"{self.tensors[name].file}: tensor {name} is not known to this model family",
                    "refused rather than dropped: the family's JSON file must name it",
                )


def read_header(file: Path) -> list[TensorEntry]:
    """Parse one safetensors header and check it against the file's length.

    Raises:
        LoramError: The file is absent, truncated, or its header is not sound.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise LoramError(f"{file}: is no regular file", _COPY_AGAIN)
        file_bytes = found.st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise LoramError(f"{file}: truncated, or not a safetensors file", _COPY_AGAIN)
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise LoramError(f"{file}: shard cannot be read ({error.strerror})", _COPY_AGAIN) from error
    except ValueError as error:
        raise LoramError(f"{file}: the safetensors header is not JSON", _COPY_AGAIN) from error
    if not isinstance(header, dict):
        raise LoramError(f"{file}: the safetensors header is not a mapping", _COPY_AGAIN)
    data_start = 8 + header_bytes
    entries = [
        _entry(file, name, info, data_start)
        for name, info in header.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: entry.offset_bytes)
    end = data_start
    for entry in entries:
        if entry.offset_bytes < end:
            raise LoramError(f"{file}: tensor {entry.name} overlaps another", _COPY_AGAIN)
        end = entry.offset_bytes + entry.num_bytes
    if end > file_bytes:
        raise LoramError(
            f"{file}: truncated: {file_bytes} bytes, its header promises {end}", _COPY_AGAIN
        )
    return entries


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json``.

    Raises:
        LoramError: It is absent, not JSON, or has widths that cannot be.
    """
    config = read_json(directory / "config.json")
    check_widths(config, str(directory / "config.json"))
    check_required(config, str(directory / "config.json"))
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LoramError: The file is absent, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise LoramError(
            f"{file}: no such file", "is this a Hugging Face model directory?"
        ) from error
    except OSError as error:
        raise LoramError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise LoramError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise LoramError(f"{file}: a JSON object is wanted")
    return value


_COPY_AGAIN = "copy or download the checkpoint again"


def _weight_map(directory: Path) -> dict[str, str]:
    """Shard by tensor name from the index file; empty when the model is one file."""
    if not (directory / INDEX_NAME).is_file():
        if (directory / SINGLE_NAME).is_file():
            return {}
        if list(directory.glob("*.bin")) or list(directory.glob("*.pth")):
            raise LoramError(
                f"{directory}: only pickled weights (.bin, .pth), which are never loaded",
                "convert them to safetensors first",
            )
        raise LoramError(f"{directory}: no {SINGLE_NAME} and no {INDEX_NAME}")
    weight_map = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoramError(f"{directory / INDEX_NAME}: no weight_map")
    for name, shard_name in weight_map.items():
        if not _is_plain_name(shard_name):
            raise LoramError(
                f"{directory / INDEX_NAME}: {name} lies outside the directory "
                f"({str(shard_name)[:60]!r})"
            )
    return weight_map


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and "\0" not in name
        and name != ".."
        and Path(name).name == name
    )


def _entry(file: Path, name: str, info: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise LoramError(f"{file}: the header entry of {name} is malformed", _COPY_AGAIN) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise LoramError(f"{file}: tensor {name} has the unsupported type {str(dtype)[:40]!r}")
    if sound:
        entry = TensorEntry(name, DTYPES[dtype], tuple(shape), file, data_start + begin)
        if end - begin == entry.num_bytes:
            return entry
    raise LoramError(f"{file}: the header entry of {name} does not add up", _COPY_AGAIN)
