"""Units of memory and time, for people."""

import re
from fractions import Fraction

from loram_cli.errors import UsageError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_BYTES_PER_UNIT = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
    # As ls and free write them.
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}

_PARAMS_PER_UNIT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def common_unit(most_bytes: float) -> tuple[str, int]:
    """The unit of one table or picture, and its bytes."""
    return ("GiB", GIB) if most_bytes >= 2 * GIB else ("MiB", MIB)


def format_bytes(count_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least one whole, e.g. ``11.19 GiB``."""
    for unit_bytes, name in ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count_bytes) >= unit_bytes:
            return f"{count_bytes / unit_bytes:.2f} {name}"
    return f"{int(count_bytes)} B"


def format_params(count_params: int) -> str:
    """A parameter count, short: ``13.02B``, ``2.23M``, ``640``."""
    for scale, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count_params >= scale:
            return f"{count_params / scale:.2f}{suffix}"
    return str(count_params)


def format_seconds(seconds: float) -> str:
    """A duration: ``4.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def whole_number(text: str) -> int | None:
    """The number that decimal digits write.

    Returns:
        None for all else, such as other scripts' digits or more of them than any count has:
        names in files of strangers may hold either.
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def parse_params(text: str) -> int:
    """A parameter count from ``6B``, ``350M``, ``1.5e9`` or a bare number.

    Raises:
        UsageError: The text is not a count.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?(?:[eE]\+?\d\d?)?)\s*([kKmMbBtT]?)\s*", text)
    if match is None:
        raise UsageError(f"'{text[:60]}' is not a count of parameters", "write it as 6B or 350M")
    # The decimal as it was written: in binary floating point 1.1 * 10**9 need not be whole.
    return int(Fraction(match[1]) * _PARAMS_PER_UNIT[match[2].lower()])


def parse_bytes(text: str) -> int:
    """Bytes from ``24GiB``, ``24G``, ``500 MB`` or a bare number.

    Raises:
        UsageError: The text is not an amount of memory, or so few bytes that a unit was forgotten.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _BYTES_PER_UNIT:
        raise UsageError(f"'{text[:60]}' is not an amount of memory", "write it as 24GiB or 500MiB")
    count_bytes = int(float(match[1]) * _BYTES_PER_UNIT[match[2].lower()])
    if not match[2] and 0 < count_bytes < MIB:
        raise UsageError(f"'{text}' is {count_bytes} bytes", f"write the unit, as in {text}GiB")
    return count_bytes
