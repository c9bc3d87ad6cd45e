"""Rows of few bits to floating numbers and back; see :mod:`.low_bit` for how they lie."""

from dataclasses import dataclass

import torch

from loram_cli.checkpoint.low_bit import SCALE_BYTES, LowBit
from loram_cli.checkpoint.trellis import values_of, values_of_planes

STEPS = {"grid": 16, "trellis": 256}
"""Steps that a group can have, as shares of its row's scale, by what codes stand for."""
ZEROS = 16
"""Places that a group's zero can have."""
# How much smaller a step is than the one before it, in powers of two. On a grid the smallest is
# 0.29 of the row's scale; on a trellis, which has no zeros to store, 0.005.
STEP_RATIO = {"grid": 0.12, "trellis": 0.03}
# How far a zero moves from the middle of the codes, in codes. Fewer codes move it less.
_ZERO_REACH = {2: 0.6, 3: 1.0, 4: 1.6}


def step_of(index: torch.Tensor, low_bit: LowBit) -> torch.Tensor:
    """Steps by index as shares of the row's scale, falling, fp32."""
    return torch.exp2(-STEP_RATIO[low_bit.codes] * index.float())


def zero_of(index: torch.Tensor, low_bit: LowBit) -> torch.Tensor:
    """Zeros by index, in codes, fp32; index 8 is the middle."""
    middle = (2**low_bit.bits - 1) / 2
    reach = _ZERO_REACH[low_bit.bits]
    return middle + reach * (index.float() - ZEROS // 2) / (ZEROS // 2)


@dataclass(frozen=True)
class Codes:
    """A rounded weight: ``(code - zero) * step`` of each group, or a trellis' value times it.

    Attributes:
        codes: uint8, shape (rows, padded columns).
        step: Index of each group's step, uint8, shape (rows, groups).
        zero: Index of each group's zero, uint8, shape (rows, groups); 0 on a trellis.
        scale: Of each row, fp16, shape (rows,).
    """

    codes: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor


def pack(weight: Codes, low_bit: LowBit) -> torch.Tensor:
    """Rows of bytes, uint8, shape (rows, row_bytes)."""
    rows = weight.codes.shape[0]
    eights = weight.codes.reshape(rows, -1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=eights.device)
    planes = [
        (((eights >> bit) & 1) << place).sum(-1, dtype=torch.uint8) for bit in range(low_bit.bits)
    ]
    group = weight.step if low_bit.codes == "trellis" else weight.step | (weight.zero << 4)
    scale = weight.scale.to(torch.float16).reshape(rows, 1).view(torch.uint8)
    return torch.cat([*planes, group, scale], dim=1)


def unpack(packed: torch.Tensor, low_bit: LowBit, columns: int) -> Codes:
    """Undo :func:`pack`.

    Args:
        packed: uint8, shape (rows, row_bytes).
        low_bit: How the rows are rounded.
        columns: Of the weight.
    """
    planes, group = _planes_and_groups(packed, low_bit, columns)
    planes = planes.unsqueeze(-1)
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    codes = (planes[:, 0] >> place) & 1
    for bit in range(1, low_bit.bits):
        codes |= ((planes[:, bit] >> place) & 1) << bit
    grid = low_bit.codes == "grid"
    step, zero = (group & 15, group >> 4) if grid else (group, torch.zeros_like(group))
    return Codes(codes.reshape(len(packed), -1), step, zero, row_scales(packed))


def _planes_and_groups(
    packed: torch.Tensor, low_bit: LowBit, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows of bytes hold beside their scales.

    Returns:
        The planes of the codes, shape (rows, bits, bytes), and the groups' bytes.
    """
    end = low_bit.code_bytes(columns)
    planes = packed[:, :end].reshape(len(packed), low_bit.bits, -1)
    return planes, packed[:, end:-SCALE_BYTES]


def row_scales(packed: torch.Tensor) -> torch.Tensor:
    """The scale of each row of bytes, fp16, shape (rows,)."""
    return packed[:, -SCALE_BYTES:].contiguous().view(torch.float16)[:, 0]


def weight_of(
    packed: torch.Tensor, low_bit: LowBit, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The floating weight of rows of bytes, shape (rows, columns)."""
    if low_bit.codes == "grid":
        return dequantize(unpack(packed, low_bit, columns), low_bit, columns, dtype)
    planes, group = _planes_and_groups(packed, low_bit, columns)
    values = values_of_planes(planes, low_bit.bits, low_bit.groups(columns), dtype)
    steps = group_steps(group, row_scales(packed), low_bit)
    return _stepped(values, steps, columns)


def dequantize(weight: Codes, low_bit: LowBit, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The floating weight of codes, shape (rows, columns)."""
    step = group_steps(weight.step, weight.scale, low_bit)
    codes = weight.codes.reshape(*weight.step.shape, -1)
    # In place, and rounded once in the type asked for: this runs at every use of the weight.
    if low_bit.codes == "trellis":
        values = values_of(codes, low_bit.bits, dtype)
    else:
        values = codes.to(dtype).sub_(zero_of(weight.zero, low_bit).to(dtype).unsqueeze(-1))
    return _stepped(values, step, columns)


def _stepped(values: torch.Tensor, steps: torch.Tensor, columns: int) -> torch.Tensor:
    """Values by group times the groups' steps, without what fills up the last group."""
    values.mul_(steps.to(values.dtype).unsqueeze(-1))
    return values.view(len(values), -1)[:, :columns]


def group_steps(step: torch.Tensor, scale: torch.Tensor, low_bit: LowBit) -> torch.Tensor:
    """Each group's step in fp32, from its index and its row's scale, shape (rows, groups)."""
    return step_of(step, low_bit) * scale.float().unsqueeze(1)
