"""A Hugging Face model whose decoder layers differ in width.

transformers reads ``per_layer_config`` but its modelling classes still build every layer from the
global widths. The subclass made here builds each layer from its own entry, and nothing else: the
config keeps the family's ``model_type``, so that the directory loads without this door once the
modelling half of transformers lands.
"""

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loram_cli.arch.spec import Family, LayerGeometry
from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError, UsageError
from loram_cli.quiet import no_progress_bars, quiet_libraries


@cache
def narrow_class(family: Family) -> type:
    """The family's causal LM class, with layer ``i`` built from ``config.per_layer_config[i]``.

    Its attribute ``family`` is the family.
    """
    import transformers

    parent = getattr(transformers, family.architecture)

    def __init__(self: Any, config: Any) -> None:
        parent.__init__(self, config)
        if config.is_heterogeneous:
            layers = self.get_submodule(family.layers)
            plain = config.to_dict()
            for i, widths in enumerate(family.geometry(plain).layers):
                if family.attributes is None:
                    # Layers of different kinds may be of different classes.
                    layers[i] = type(layers[i])(config.per_layer_config[i], i)
                _cut_to_size(layers[i], family, widths, plain)
            self.post_init()

    # In its parent's module: transformers renames a published file's tensors for its own alone.
    members = {"__init__": __init__, "__module__": parent.__module__, "family": family}
    return type(family.architecture, (parent,), members)


def _cut_to_size(
    layer: Any, family: Family, widths: LayerGeometry, config: Mapping[str, Any]
) -> None:
    """Linears and attributes of a layer whose class does not take all of its widths.

    Args:
        layer: The layer's module; changed in place.
        family: Tells the shapes, and which attributes hold widths.
        widths: What the layer is to have.
        config: The parsed ``config.json``.
    """
    for path, width in (family.attributes or {}).items():
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, getattr(widths, width))
    shapes = family.layer_shapes(0, widths, config)
    for module in family.layer_modules(widths):
        rows, columns = shapes[f"{family.layer_prefix(0)}{module.name}.weight"]
        linear = layer.get_submodule(module.name)
        if (linear.out_features, linear.in_features) != (rows, columns):
            # Of the same class: some families have a linear of their own.
            cut = type(linear)(columns, rows, bias=linear.bias is not None)
            owner, _, name = module.name.rpartition(".")
            setattr(layer.get_submodule(owner), name, cut.to(linear.weight.dtype))


def load_causal_lm(
    model: Path | Model,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
    attention: str | None = None,
    quantization_config: Any | None = None,
) -> Any:
    """Load a base, pruned, aligned or merged directory as a Hugging Face causal LM.

    Args:
        model: A model, or its directory with ``config.json`` and safetensors; widths may differ
            per layer.
        dtype: Parameter type; ``auto`` takes the checkpoint's own.
        device: ``cpu``, ``cuda``, ...; None takes a GPU when there is one.
        attention: ``sdpa``, ``flash`` or ``eager``; None and ``auto`` leave it to transformers.
        quantization_config: As ``from_pretrained`` takes it, see :mod:`.quantize`.

    Returns:
        The model in evaluation mode.

    Raises:
        LoramError: Unknown family, or weights that do not fit the config.
        UsageError: There is no such device.
    """
    import transformers

    source = Model.of(model)
    directory, family = source.directory, source.family
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # Each config class has its own way to refuse a value.
        reason = next(iter(str(error).strip().splitlines()), repr(error))[:160]
        raise LoramError(f"{directory / 'config.json'}: cannot be used ({reason})") from error
    # Global widths stay readable: the base class's __init__ needs them before layers are replaced.
    config.allow_global_per_layer_attribute_access = True
    kwargs = {} if quantization_config is None else {"quantization_config": quantization_config}
    if attention not in (None, "auto"):
        kwargs["attn_implementation"] = attention_kernel(attention)
    with quiet_libraries(), no_progress_bars():
        loaded, report = narrow_class(family).from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map={"": usable_device(device)},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    problems = [name for key in ("missing_keys", "mismatched_keys") for name in report[key]]
    unexpected = [name for name in report["unexpected_keys"] if not family.is_ignored(name)]
    if problems or unexpected:
        first = (problems + unexpected)[0]
        raise LoramError(
            f"{directory}: tensor {first} does not fit config.json "
            f"({len(problems)} missing or misshapen, {len(unexpected)} unexpected)"
        )
    return loaded.eval()


def attention_kernel(name: str) -> str:
    """Transformers' name of an attention kernel.

    Args:
        name: ``sdpa``, ``flash`` or ``eager``.

    Raises:
        LoramError: The kernel's package is absent.
    """
    if name != "flash":
        return name
    if importlib.util.find_spec("flash_attn") is None:
        raise LoramError(
            "--attention flash: the package flash-attn is not installed",
            "pip install flash-attn, or pass --attention sdpa, which needs as little memory",
        )
    return "flash_attention_2"


def load_tokenizer(model_dir: Path) -> Any:
    """Load the directory's tokenizer, with a pad token set (eos where there is none).

    Raises:
        LoramError: The directory has no tokenizer that transformers can read.
    """
    import transformers

    try:
        with quiet_libraries(), no_progress_bars():
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise LoramError(
            f"{model_dir}: no tokenizer that transformers can read",
            "the directory needs tokenizer.json (or tokenizer.model) and tokenizer_config.json",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def default_device() -> str:
    """``cuda`` when a GPU is usable, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(device: str | None) -> str:
    """The device asked for, or the default one.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU when there is one.

    Raises:
        UsageError: Torch knows no such device, or this machine has no such GPU.
    """
    if device is None:
        return default_device()
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device}: unknown", "pass cpu, cuda or cuda:1") from error
    if wanted.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= found:
            raise UsageError(
                f"device {device}: no such GPU; torch finds {found} here",
                "pass --device cpu" if found == 0 else "start one process for each GPU",
            )
    return device
