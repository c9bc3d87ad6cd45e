"""A causal LM of a config's shapes with random weights, built in its target precision.

Each tensor is made on its device, in the type that it is to have, one after the other; under NF4 a
linear's bf16 weights are gone before the next one's are made. Nothing is read, and no whole model
in a wider type ever exists, on the device or beside it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from loram_cli.arch.spec import Family
from loram_cli.modeling.load import attention_kernel
from loram_cli.modeling.meta_model import meta_causal_lm, native_config
from loram_cli.modeling.quantize import (
    keep_standard_layout,
    nf4_linear,
    nf4_weight,
    require_bitsandbytes,
)
from loram_cli.quiet import quiet_libraries

_INITIAL_STD = 0.02


def random_causal_lm(
    family: Family,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: str,
    attention: str = "sdpa",
    nf4: bool = False,
    seed: int = 0,
) -> Any:
    """Build the model.

    Args:
        family: The config's.
        config: A ``config.json``, with or without ``per_layer_config``.
        dtype: Of all weights that are not quantized, and of products with those that are.
        device: ``cpu``, ``cuda``, ...
        attention: ``sdpa``, ``flash`` or ``eager``.
        nf4: Quantize the decoder linears, with double quantization.
        seed: Of the weights.

    Returns:
        The model in evaluation mode, every weight frozen.

    Raises:
        LoramError: A library that is asked for is not installed.
    """
    if nf4:
        require_bitsandbytes()
    with quiet_libraries():
        native = native_config(config, dtype)
        model = meta_causal_lm(
            family, native, device, attn_implementation=attention_kernel(attention), dtype=dtype
        )
    generator = torch.Generator(device).manual_seed(seed)
    linears = set(family.linear_names(config))
    done: dict[int, torch.nn.Parameter] = {}
    for module_name, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in done:
                # The parameter itself is kept alive, so that its id stays its own.
                weight = _random(parameter, dtype, device, generator)
                if nf4 and f"{module_name}.{name}" in linears:
                    _quantize(model, module_name, weight, dtype)
                    del weight
                    continue
                done[id(parameter)] = torch.nn.Parameter(weight, requires_grad=False)
            module._parameters[name] = done[id(parameter)]
    if nf4:
        keep_standard_layout(model)
        # PEFT looks here before it chooses its 4-bit LoRA linear.
        model.is_loaded_in_4bit = True
    return model


def _random(
    parameter: torch.nn.Parameter, dtype: torch.dtype, device: str, generator: torch.Generator
) -> torch.Tensor:
    weight = torch.empty(parameter.shape, dtype=dtype, device=device)
    if parameter.dim() == 1:
        return weight.fill_(1.0)
    return weight.normal_(std=_INITIAL_STD, generator=generator)


def _quantize(model: Any, module_name: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    plain = model.get_submodule(module_name)
    module = nf4_linear(plain, dtype)
    module.weight = nf4_weight(weight)
    if plain.bias is not None:
        module.bias = torch.nn.Parameter(
            torch.zeros(plain.out_features, dtype=dtype, device=weight.device), requires_grad=False
        )
    owner, _, name = module_name.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
