"""Models in NF4, as ``--quantize nf4`` holds them and as transformers does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.quantize import keep_standard_layout
from loram_cli.modeling.skeleton import SkeletonModel, fill


def nf4_model(
    directory: Path, attach: Callable[[Any], Any] | None = None, *, dtype=torch.float32, **how: Any
) -> Any:
    """The model, frozen, with what ``attach`` puts on it.

    Experts are whole, as where layers are streamed or shared out.
    """
    skeleton = SkeletonModel(directory, nf4=True, dtype=dtype, device="cpu", **how)
    model = attach(skeleton.model) if attach is not None else skeleton.model
    with TensorReader(skeleton.index) as reader:
        for slot in skeleton.slots.values():
            fill(slot, skeleton.read(slot, reader))
    return model


def transformers_nf4(directory: Path) -> Any:
    """The same by ``from_pretrained``, which takes no model whose layers differ."""
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )
    keep_standard_layout(model)
    return model.requires_grad_(False).eval()
