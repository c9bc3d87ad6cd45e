"""A causal LM without weights, whose tensors are put in later, one by one."""

from collections.abc import Mapping
from typing import Any

import torch

from loram_cli.arch.spec import Family
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.modeling.load import narrow_class

_FLOAT_KEY = "__float__"


def native_config(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The transformers config of a ``config.json``, whose layers may differ in width."""
    import transformers

    settings = {name: _decoded(value) for name, value in config.items() if name != "model_type"}
    settings["allow_global_per_layer_attribute_access"] = True
    settings["dtype"] = dtype
    return transformers.AutoConfig.for_model(config["model_type"], **settings)


def _decoded(value: Any) -> Any:
    """A value of ``config.json``: transformers writes infinity as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        is_number = value.keys() == {_FLOAT_KEY}
        return (
            float(value[_FLOAT_KEY])
            if is_number
            else {key: _decoded(item) for key, item in value.items()}
        )
    return [_decoded(item) for item in value] if isinstance(value, list) else value


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
        narrow: Any = narrow_class(family)
        model = narrow._from_config(config, **settings)
    model.tie_weights()
    model.eval().requires_grad_(False)
    # A module's buffers may be its parents' to fill.
    filled = {""}
    for path, buffer in list(model.named_buffers(remove_duplicate=False)):
        if not buffer.is_meta:
            continue
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, torch.empty_like(buffer, device=device))
        while owner:
            filled.add(owner)
            owner = owner.rpartition(".")[0]
    for path, module in model.named_modules():
        if path in filled:
            model._init_weights(module)
    return model


def fill_stored_buffers(
    module: Any, prefix: str, index: CheckpointIndex, reader: TensorReader, device: str
) -> None:
    """Fill the buffers that a checkpoint holds, such as a router's biases: small, kept as stored.

    Args:
        module: A model, or one of its layers; changed in place.
        prefix: Of its tensors' names in the checkpoint.
        index: Of the checkpoint.
        reader: Of the same.
        device: Where they go.

    Raises:
        LoramError: One is of another shape.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, buffer in module.state_dict().items():
        if name not in parameters and prefix + name in index.tensors:
            index.entry_of(prefix + name, buffer.shape)
            owner, _, kind = name.rpartition(".")
            stored = reader.read(prefix + name).to(device)
            module.get_submodule(owner)._buffers[kind] = stored
