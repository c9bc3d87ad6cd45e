"""Trellis codes: a weight's value is told by its own code and by those before it in its group.

A code of 2 bits picks one of 4 values, and the codes before it pick which 4: the last few codes of
a group together are a place in a table of 256 or 512 values. A group has as many bits as with
equal steps, and far more values to choose from, so that the least squared error of Gaussian
numbers is 0.083 of their variance in 2 bits where that of 4 values of one's own choice is 0.118.

Source: trellis-coded quantization (Marcellin and Fischer, 1990), with a shift register for its
trellis, as in QTIP (Tseng et al., arXiv 2406.11235), whose window is wider and whose values are
drawn. Here they are few enough to be trained: ``trellis.json`` has what
``tests/benchmarks/trellis_tables.py`` found.
"""

import json
from functools import cache
from importlib import resources

import torch

_FILE = "trellis.json"
WINDOW = {2: 4, 3: 3, 4: 2}
"""Codes that tell a value, its own included, by the bits of a code."""
# Values that are looked up together: one place in a wider table says them all.
_TOGETHER = {2: 4, 3: 2, 4: 2}
# Codes of a byte of each plane.
_EIGHT = 8
# Of a large weight, so that places, which take more memory than codes, are few.
_WEIGHTS_AT_ONCE = 2**20


@cache
def table(bits: int) -> torch.Tensor:
    """Values by the last codes, the newest in the lowest bits; fp32, of about unit variance.

    Args:
        bits: Of a code.

    Returns:
        Shape (2 ** (bits * WINDOW[bits]),).
    """
    values = json.loads(resources.files("loram_cli.checkpoint").joinpath(_FILE).read_text("utf-8"))
    with torch.inference_mode(False):
        return torch.tensor(values[str(bits)], dtype=torch.float32)


def values_of(codes: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of codes, each group's by itself.

    Args:
        codes: uint8, shape (rows, groups, group_size); the group size is a multiple of 8.
        bits: Of a code.
        dtype: Of the values.

    Returns:
        Shape (rows, groups, group_size).
    """
    eights = codes.reshape(*codes.shape[:2], -1, _EIGHT)
    words = eights[..., 0].to(torch.int64)
    for i in range(1, _EIGHT):
        words = (words << bits) | eights[..., i]
    return _values_of_words(words, bits, dtype)


def values_of_planes(
    planes: torch.Tensor, bits: int, groups: int, dtype: torch.dtype
) -> torch.Tensor:
    """The values of codes in planes of bits, as they are stored.

    Args:
        planes: uint8, shape (rows, bits, bytes): the lowest bits of eight codes in each byte of the
            first plane, and so on.
        bits: Of a code.
        groups: Of a row.
        dtype: Of the values.

    Returns:
        Shape (rows, groups, group_size).
    """
    spread = _spread(bits, str(planes.device))
    words = spread[planes[:, 0].int()]
    for bit in range(1, bits):
        words |= spread[planes[:, bit].int()] << bit
    return _values_of_words(words.view(len(planes), groups, -1), bits, dtype)


def _values_of_words(words: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of eights of codes, of which the first is in the highest bits.

    Args:
        words: int64, shape (rows, groups, eights).
        bits: Of a code.
        dtype: Of the values.
    """
    together, before = _TOGETHER[bits], bits * (WINDOW[bits] - 1)
    wide = _wide_table(bits, dtype, str(words.device))
    values = torch.empty(
        (*words.shape[:2], _EIGHT * words.shape[2]), dtype=dtype, device=words.device
    )
    shifts = range(bits * (_EIGHT - together), -1, -bits * together)
    rows = max(1, _WEIGHTS_AT_ONCE // max(1, values[0].numel()))
    for word, found in zip(words.split(rows), values.split(rows), strict=True):
        whole = word.clone()
        whole[..., 1:] |= (word[..., :-1] & ((1 << before) - 1)) << _EIGHT * bits
        places = torch.stack([(whole >> shift) & (len(wide) - 1) for shift in shifts], dim=-1)
        torch.index_select(wide, 0, places.view(-1), out=found.view(-1, together))
    return values


@cache
def _spread(bits: int, device: str) -> torch.Tensor:
    """A byte's bits moved apart, each to where its code lies in a word of eight: shape (256,)."""
    with torch.inference_mode(False):
        byte = torch.arange(256)
        moved = [((byte >> i) & 1) << bits * (_EIGHT - 1 - i) for i in range(_EIGHT)]
        return torch.stack(moved).sum(0).to(device)


@cache
def _wide_table(bits: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Values of neighbours by their codes and those before: shape (places, together)."""
    together, window = _TOGETHER[bits], WINDOW[bits]
    with torch.inference_mode(False):
        places = torch.arange(2 ** (bits * (window - 1 + together)))
        last = 2 ** (bits * window) - 1
        columns = [
            table(bits)[(places >> bits * (together - 1 - i)) & last] for i in range(together)
        ]
        return torch.stack(columns, dim=1).to(device, dtype)
