"""NF4 quantization with double quantization (QLoRA, arXiv 2305.14314). The door to bitsandbytes."""

from typing import Any

import torch

from loram_cli.arch.spec import Family
from loram_cli.errors import LoramError


def nf4_config(compute_dtype: torch.dtype, family: Family) -> Any:
    """What ``from_pretrained`` needs to quantize every decoder linear while loading.

    Args:
        compute_dtype: Type in which products are taken.
        family: Names the output head, which stays as it is.

    Raises:
        LoramError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401 - transformers would fail later and longer
    except ImportError as error:
        raise LoramError("--quantize nf4 needs bitsandbytes", "pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[family.lm_head],
    )
