"""How a weight of few bits lies in a checkpoint: one record of bytes for each of its rows.

A row holds the codes of its weights, then one byte for each group of neighbours, then one fp16
scale. Codes lie in planes: first the lowest bit of every weight, eight weights a byte, then the
next bit. On a grid, a group's byte is two numbers of four bits: the low one says how much smaller
its step is than the row's scale, the high one where its zero lies. On a trellis
(:mod:`.trellis`) the byte says how much smaller the step is, and nothing else. Uneven groups are no
case of their own: the row is filled up to whole groups.

A row by itself can be read, so that a tensor streams as any other does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from loram_cli.checkpoint.header import DTYPES, DType, TensorEntry
from loram_cli.errors import LoramError

# In ``config.json``.
CONFIG_KEY = "loram_low_bit"
BITS = (2, 3, 4)
# A plane's byte holds eight weights of one group.
GROUP_MULTIPLE = 8
# Unless told.
GROUP_SIZE = 64
SCALE_BYTES = 2
_NUMBERS = ("bits", "group_size")
_CODES = "codes"
LARGEST_GROUP = 1024
CodeKind = Literal["grid", "trellis"]
"""What a code stands for: one of equal steps, or a value that the codes before it tell as well."""


@dataclass(frozen=True)
class LowBit:
    """How the decoder linears of a checkpoint are rounded.

    Attributes:
        bits: Of a code.
        group_size: Neighbours in a row that share a step and a zero; a multiple of 8.
        codes: What a code stands for.
    """

    bits: int
    group_size: int
    codes: CodeKind = "grid"

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str) -> Self | None:
        """What a config says; None for a checkpoint of whole weights.

        Raises:
            LoramError: It says something that cannot be.
        """
        said = config.get(CONFIG_KEY)
        if said is None:
            return None
        numbers = [said.get(key) for key in _NUMBERS] if isinstance(said, Mapping) else [None, None]
        bits, group = (number if type(number) is int else 0 for number in numbers)
        codes: Any = said.get(_CODES, "grid") if isinstance(said, Mapping) else None
        sizes_fit = bits in BITS and group % GROUP_MULTIPLE == 0 and 0 < group <= LARGEST_GROUP
        if not sizes_fit or codes not in get_args(CodeKind):
            raise LoramError(
                f"{where}: {CONFIG_KEY} is {str(said)[:60]}, expected bits of "
                f"{', '.join(map(str, BITS))}, a group_size that is a multiple of 8 and codes of "
                f"{' or '.join(get_args(CodeKind))}"
            )
        return cls(bits, group, codes)

    def to_mapping(self) -> dict[str, Any]:
        """As the config says it."""
        numbers = dict(zip(_NUMBERS, (self.bits, self.group_size), strict=True))
        return numbers if self.codes == "grid" else {**numbers, _CODES: self.codes}

    def groups(self, columns: int) -> int:
        """Groups of a row, the last one filled up."""
        return -(-columns // self.group_size)

    def padded(self, columns: int) -> int:
        """Codes of a row."""
        return self.groups(columns) * self.group_size

    def code_bytes(self, columns: int) -> int:
        """Bytes of a row's codes."""
        return self.bits * self.padded(columns) // 8

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row: codes, groups and scale."""
        return self.code_bytes(columns) + self.groups(columns) + SCALE_BYTES


@dataclass(frozen=True, kw_only=True)
class PackedEntry(TensorEntry):
    """A weight of few bits as its readers know it: floating numbers of the weight's own shape.

    Attributes:
        stored: Where its rows of bytes lie.
        low_bit: How they are rounded.
    """

    stored: TensorEntry
    low_bit: LowBit

    @property
    def num_bytes(self) -> int:
        """Bytes that are stored."""
        return self.stored.num_bytes


def as_weight(
    entry: TensorEntry, shape: tuple[int, ...], low_bit: LowBit, dtype: DType
) -> TensorEntry:
    """The entry of a decoder linear's weight, as a model wants it.

    Args:
        entry: As the shard's header has it.
        shape: Of the weight, (rows, columns).
        low_bit: Of the checkpoint.
        dtype: The type that the model's other weights are stored in.

    Raises:
        LoramError: The bytes do not make up a weight of that shape.
    """
    rows, columns = shape
    expected = (rows, low_bit.row_bytes(columns))
    if entry.dtype != DTYPES["U8"] or entry.shape != expected:
        raise LoramError(
            f"{entry.file}: tensor {entry.name} is {entry.dtype.name} {list(entry.shape)}, "
            f"{low_bit.bits} bits for a weight of {list(shape)} take U8 {list(expected)}"
        )
    return PackedEntry(
        entry.name,
        dtype,
        tuple(shape),
        Path(entry.file),
        entry.offset_bytes,
        stored=entry,
        low_bit=low_bit,
    )
