"""A causal LM without weights, whose tensors are put in later, one by one."""

from collections.abc import Mapping
from typing import Any

import torch

from loram_cli.arch.spec import Family
from loram_cli.modeling.load import narrow_class


def native_config(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The transformers config of a ``config.json``, whose layers may differ in width."""
    import transformers

    settings = {name: value for name, value in config.items() if name != "model_type"}
    settings["allow_global_per_layer_attribute_access"] = True
    settings["dtype"] = dtype
    return transformers.AutoConfig.for_model(config["model_type"], **settings)


def meta_causal_lm(family: Family, config: Any, device: str, **settings: Any) -> Any:
    """The family's model on torch's meta device, frozen, in evaluation mode.

    Buffers that no checkpoint holds (rotary frequencies, embedding scales) are on ``device``,
    computed by the model's own initialization, as ``from_pretrained`` does.

    Args:
        family: The model's family.
        config: A transformers config, with or without ``per_layer_config``.
        device: Of the buffers: ``cpu``, ``cuda``, ...
        **settings: For ``_from_config``, such as ``dtype`` and ``attn_implementation``.
    """
    with torch.device("meta"):
        model = narrow_class(family)._from_config(config, **settings)
    model.tie_weights()
    model.eval().requires_grad_(False)
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if names:
            model._init_weights(module)
    return model
