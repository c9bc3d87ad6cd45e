"""NF4 quantization of a pruned base for QLoRAM. The door to bitsandbytes."""

import importlib
import importlib.util
from typing import Any

import torch

from loram_cli.arch.experts import Experts
from loram_cli.errors import LoramError
from loram_cli.quiet import quiet_libraries


def require_bitsandbytes() -> None:
    """Refuse what needs bitsandbytes where it is absent.

    Raises:
        LoramError: It is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoramError(
            "NF4 needs bitsandbytes, which is not installed here",
            "pip install bitsandbytes, or train without --quantize",
        )
    # Its first import warns of a missing optional CPU kernel, and it works without.
    with quiet_libraries():
        importlib.import_module("bitsandbytes")


def nf4_linear(plain: Any, compute_dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> Any:
    """A 4-bit linear of a plain one's shape, on torch's meta device; its weight is put in later.

    Args:
        plain: A ``torch.nn.Linear``.
        compute_dtype: The weight is expanded to this type for each product.
        storage: The type that packed weights are held as; the bits are the same in any.
    """
    import bitsandbytes

    return bitsandbytes.nn.Linear4bit(
        plain.in_features,
        plain.out_features,
        bias=plain.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=storage,
        device="meta",
    )


def nf4_weight(weight: torch.Tensor, storage: torch.dtype = torch.uint8) -> Any:
    """Quantize one weight where it is, with double quantization."""
    import bitsandbytes

    return bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=storage,
    ).to(weight.device)


def expanded_nf4(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """A 4-bit weight's values, shape (out, in).

    Args:
        packed: As it is held.
        state: Its block constants and shape.
    """
    import bitsandbytes

    values: torch.Tensor = bitsandbytes.functional.dequantize_4bit(packed.view(-1, 1), state)
    return values


def quantize_experts(layer: Any, experts: Experts) -> None:
    """Hold a layer's experts in NF4, with double quantization.

    They are expanded while the layer runs, all of them together, and again for its backward pass
    where the layer is checkpointed.

    Args:
        layer: A decoder layer with its weights; changed in place.
        experts: Which weights are theirs.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    held = dict(layer.named_parameters())
    for name in experts.parameters:
        if name in held:
            owner, _, kind = name.rpartition(".")
            replace_parameter_4bit(
                layer.get_submodule(owner), kind, compress_statistics=True, quant_type="nf4"
            )


def keep_standard_layout(model: Any) -> None:
    """Keep 4-bit weights in the layout that they were loaded in.

    On a CPU with bf16 instructions, bitsandbytes repacks a layer's weights in place the first
    time that it runs in evaluation mode. That fails for widths that are no multiple of 64, which
    pruned layers have, and rounds the block constants on the way back: an evaluation would change
    the weights that are trained on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
