"""Experts that published files hold in MXFP4, as the floating weights that they stand for.

In OCP's microscaling format 32 neighbours along the input share an exponent of one byte, and each
is a number of four bits: a sign, two bits of exponent, one of mantissa. Files hold two tensors in
a weight's place, ``NAME_blocks`` and ``NAME_scales``. Source: "OCP Microscaling Formats (MX)
Specification v1.0", and the files of ``openai/gpt-oss-20b``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.arch.registry import families
from loram_cli.arch.spec import Family
from loram_cli.checkpoint.header import DTYPES, DType, TensorEntry
from loram_cli.errors import LoramError

METHOD = "mxfp4"
"""What a ``quantization_config`` calls the format."""

BLOCK = 32
"""Neighbours that share an exponent; two of them take a byte."""

BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of the two tensors."""


@dataclass(frozen=True, kw_only=True)
class Mxfp4Entry(TensorEntry):
    """Experts' weights as their readers know them: floating, shape (experts, in, out).

    ``parts`` holds one pair: the numbers, uint8 of shape (experts, out, in / 32, 16), and the
    exponents, uint8 of shape (experts, out, in / 32).
    """


def takes_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its experts lie in MXFP4, and its family reads that.

    Args:
        config: The parsed ``config.json``.
    """
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    return method == METHOD and any(
        family.experts is not None and family.experts.mxfp4
        for family in families()
        if config.get("model_type") in family.model_types
    )


def with_float_experts(
    directory: Path, tensors: Mapping[str, TensorEntry], family: Family
) -> dict[str, TensorEntry]:
    """The tensors, with each pair of blocks and exponents as the weight that it stands for.

    Args:
        directory: Named in errors.
        tensors: By name, as the files hold them.
        family: Whose experts may lie in MXFP4.

    Raises:
        LoramError: One of a pair is missing, or they do not fit each other.
    """
    floating = [entry.dtype for entry in tensors.values() if entry.dtype.is_floating_point]
    dtype = floating[0] if floating else DTYPES["BF16"]
    found: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        weight, end = name[: -len(BLOCKS)], name[-len(BLOCKS) :]
        if end not in (BLOCKS, SCALES) or not _is_experts(weight, family):
            found[name] = entry
        elif weight not in found:
            pair = [tensors.get(weight + end) for end in (BLOCKS, SCALES)]
            blocks, scales = pair
            if blocks is None or scales is None:
                absent = weight + (BLOCKS if blocks is None else SCALES)
                raise LoramError(f"{directory}: tensor {absent} is missing from the weights")
            found[weight] = _entry(weight, blocks, scales, dtype)
    return found


def _is_experts(name: str, family: Family) -> bool:
    rest = family.split_layer(name)[1]
    return family.experts is not None and rest in family.experts.parameters


def _entry(name: str, blocks: TensorEntry, scales: TensorEntry, dtype: DType) -> Mxfp4Entry:
    byte = DTYPES["U8"]
    shape = blocks.shape
    fit = len(shape) == 4 and scales.shape == shape[:3] and shape[3] == BLOCK // 2
    if not fit or blocks.dtype != byte or scales.dtype != byte:
        raise LoramError(
            f"{blocks.file}: tensors {blocks.name} {list(shape)} and {scales.name} "
            f"{list(scales.shape)} are no weight in MXFP4, expected U8 "
            f"[experts, out, in / {BLOCK}, {BLOCK // 2}] and [experts, out, in / {BLOCK}]"
        )
    return Mxfp4Entry(
        name,
        dtype,
        (shape[0], shape[2] * BLOCK, shape[1]),
        blocks.file,
        blocks.offset_bytes,
        parts=((blocks, scales),),
    )
