"""Numbers of four bits with shared exponents to floating ones; see :mod:`.mxfp4`."""

import torch

# By code: the lowest three bits are the size, the fourth is the sign.
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_OF_ONE = 127


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The floating weight of numbers in MXFP4.

    Args:
        blocks: Two numbers a byte, the lower bits first; uint8, shape (rows, groups, 16).
        scales: Exponents of two, 127 for one; uint8, shape (rows, groups).
        dtype: Of the result; every product is exact in bfloat16.

    Returns:
        Shape (rows, groups * 32).
    """
    codes = torch.tensor([*_SIZES, *(-size for size in _SIZES)], dtype=dtype, device=blocks.device)
    # Both numbers of every byte, so that one look-up gives two.
    pairs = torch.stack((codes.repeat(16), codes.repeat_interleave(16)), dim=1)
    found = pairs.index_select(0, blocks.reshape(-1).int()).reshape(*scales.shape, -1)
    exponents = scales.int().sub_(_EXPONENT_OF_ONE).unsqueeze(-1)
    return torch.ldexp(found, exponents, out=found).flatten(1)
