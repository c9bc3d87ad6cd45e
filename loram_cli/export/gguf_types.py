"""Weight types that GGUF files hold and the gguf package can write."""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize

from loram_cli.errors import LoramError, UsageError
from loram_cli.schema import unknown_name

_TYPE, _FILE = GGMLQuantizationType, LlamaFileType
WRITABLE = {
    "f32": _TYPE.F32,
    "f16": _TYPE.F16,
    "bf16": _TYPE.BF16,
    "q8_0": _TYPE.Q8_0,
    "q5_1": _TYPE.Q5_1,
    "q5_0": _TYPE.Q5_0,
    "q4_1": _TYPE.Q4_1,
    "q4_0": _TYPE.Q4_0,
}
"""Types that weights can be written in, by the name that llama.cpp's tools give them."""

FLOATS = ("f32", "f16", "bf16")
"""The writable types that are not quantized."""

FILE_TYPES = {
    _TYPE.F32: _FILE.ALL_F32,
    _TYPE.F16: _FILE.MOSTLY_F16,
    _TYPE.BF16: _FILE.MOSTLY_BF16,
    _TYPE.Q8_0: _FILE.MOSTLY_Q8_0,
    _TYPE.Q5_1: _FILE.MOSTLY_Q5_1,
    _TYPE.Q5_0: _FILE.MOSTLY_Q5_0,
    _TYPE.Q4_1: _FILE.MOSTLY_Q4_1,
    _TYPE.Q4_0: _FILE.MOSTLY_Q4_0,
}
"""The value of ``general.file_type`` for each writable type."""


def type_named(name: str, among: tuple[str, ...] = tuple(WRITABLE)) -> GGMLQuantizationType:
    """The type behind a name such as ``q8_0``.

    Raises:
        UsageError: Not one of ``among``.
    """
    if name.lower() not in among:
        raise unknown_name("GGUF type", name, among, "--type")
    return WRITABLE[name.lower()]


def is_quantized(kind: GGMLQuantizationType) -> bool:
    """Whether the type packs several elements in a block."""
    return GGML_QUANT_SIZES[kind][0] > 1


def check_writable(where: str, own: GGMLQuantizationType, kind: GGMLQuantizationType) -> None:
    """Raise if a tensor that must change cannot be read or written.

    Args:
        where: File and tensor, for the message.
        own: The type that it has.
        kind: The type that it shall get.

    Raises:
        LoramError: The gguf package cannot read or write the type.
    """
    if kind not in WRITABLE.values():
        raise LoramError(
            f"{where}: its type {kind.name} can be read but not written",
            f"pass --type with one of {', '.join(WRITABLE)}; q8_0 loses least of the small ones",
        )
    if own not in (_TYPE.F32, _TYPE.F16):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[own][1]), np.uint8), own)
        except NotImplementedError as error:
            raise LoramError(
                f"{where}: the gguf package cannot read its type {own.name}",
                "take a GGUF of the same model in another type, such as F16 or Q8_0",
            ) from error


def check_block(where: str, columns: int, kind: GGMLQuantizationType) -> None:
    """Raise if a row is no whole number of the type's blocks.

    Raises:
        UsageError: It is not.
    """
    block = GGML_QUANT_SIZES[kind][0]
    if columns % block:
        raise UsageError(
            f"{where}: rows of {columns} are no multiple of {block}, which {kind.name} packs",
            "pass --type f16 or bf16",
        )


def decode(rows: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    """Stored rows as float32.

    Args:
        rows: Bytes, shape (n, bytes of a row).
        kind: Their type.

    Returns:
        Shape (n, elements of a row), in memory of its own.
    """
    return torch.from_numpy(np.array(dequantize(rows, kind), dtype=np.float32))


def encode(rows: torch.Tensor, kind: GGMLQuantizationType, where: str) -> np.ndarray:
    """Rows of float32 in a writable type.

    Args:
        rows: Shape (n, elements of a row).
        kind: The type.
        where: File and tensor, for the message.

    Returns:
        Bytes, shape (n, bytes of a row).

    Raises:
        LoramError: NaN or infinity, or a number too large for float16.
    """
    if not rows.isfinite().all():
        raise LoramError(f"{where}: NaN or infinite values", "the model's file is damaged")
    # The other types' scales are float16 too, and a NaN there is silent.
    if kind not in (_TYPE.F32, _TYPE.BF16):
        largest = rows.abs().max().item()
        if largest > torch.finfo(torch.float16).max:
            raise LoramError(
                f"{where}: {largest:.3g} is beyond what {kind.name} holds", "pass --type bf16"
            )
    return quantize(rows.contiguous().numpy(), kind).view(np.uint8)
