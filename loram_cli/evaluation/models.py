"""Models with their adapters, loaded whole, in 4 bits, or layer by layer where they do not fit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.lora.wrapped import read_adapter
from loram_cli.memory.account import BF16_BYTES, nf4_weight_bytes
from loram_cli.modeling.free_memory import free_memory_bytes
from loram_cli.modeling.load import load_causal_lm, load_tokenizer, usable_device
from loram_cli.modeling.offload import loaded_within, resident_layers, weight_bytes
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import Reporter
from loram_cli.training.adapters import load_adapter, load_beside
from loram_cli.training.data.template_names import with_adapter_template
from loram_cli.units import MIB, format_bytes

# What is left of the free memory for keys, values and activations, up to half of it.
_LEFT_SHARE = 0.1
_LEFT_BYTES = 768 * MIB
# Of the machine's free memory, for weights that are brought to a GPU from there.
_HOST_SHARE = 0.5
_FP32_BYTES = 4
_MORE_MEMORY = "pass a larger --weights-memory"


def precision(device: str | None) -> str:
    """The type that models are run in: the checkpoint's own on a GPU, else ``float32``."""
    return "auto" if usable_device(device).startswith("cuda") else "float32"


def model_bytes(model: Model, *, device: str | None, nf4: bool) -> int:
    """What a model's weights take, were all of them in memory; decoder linears in NF4 or not."""
    on_gpu = precision(device) == "auto"
    if nf4:
        item_bytes = BF16_BYTES if on_gpu else _FP32_BYTES
        return nf4_weight_bytes(model.family, model.config, item_bytes)
    return model.num_bytes if on_gpu else model.num_params * _FP32_BYTES


@contextmanager
def opened_model(
    label: str,
    model: Model,
    adapters: Sequence[Path] | Mapping[str, Path],
    reporter: Reporter,
    *,
    device: str | None = None,
    nf4: bool = False,
    weights_memory: int | None = None,
) -> Iterator[Any]:
    """A model with its adapters, in evaluation mode, for the length of the block.

    Args:
        label: The row's name, for messages.
        model: The model.
        adapters: Adapters to put on it, the first one first; or by name, to choose from.
        reporter: Warned where not all of the model is in memory.
        device: ``cpu``, ``cuda``, ``cuda:1``; None takes a GPU when there is one.
        nf4: Hold the decoder linears in 4 bits.
        weights_memory: Bytes for weights; None takes most of what is free.

    Raises:
        LoramError: It cannot be loaded, or does not fit even layer by layer.
    """
    place = usable_device(device)
    budget_bytes = weights_memory
    if budget_bytes is None:
        free_bytes = free_memory_bytes(place)
        left_bytes = max(_LEFT_BYTES, int(_LEFT_SHARE * free_bytes))
        budget_bytes = free_bytes - min(free_bytes // 2, left_bytes)
    if not nf4 and model_bytes(model, device=place, nf4=False) <= budget_bytes:
        yield _adapted(load_causal_lm(model, dtype=precision(place), device=place), adapters)
        return
    skeleton = _skeleton(model, place, nf4=nf4)
    loaded = _adapted(skeleton.model, adapters)
    ways = "pass --device cpu" if place.startswith("cuda") else "free some memory"
    if weights_memory is not None:
        ways = _MORE_MEMORY
    stay = _layers_that_stay(label, skeleton, budget_bytes, ways, nf4=nf4)
    layers = len(list(skeleton.layers()))
    if stay < layers:
        mixture = any(slot.experts for slot in skeleton.slots.values())
        reached = " (while few tokens pass, only the experts that they reach)" if mixture else ""
        # Experts stay in 16 bits.
        smaller = "" if nf4 or mixture else "; --quantize nf4 makes it about a quarter"
        reporter.warn(
            f"{label}: its weights take {format_bytes(weight_bytes(skeleton))}, and there are "
            f"{format_bytes(budget_bytes)} for them on {place}: {layers - stay} of {layers} "
            f"layers are read anew at every pass{reached}, which is slow{smaller}"
        )
    on_gpu = place.startswith("cuda")
    host_bytes = int(_HOST_SHARE * free_memory_bytes("cpu")) if on_gpu else 0
    with loaded_within(skeleton, stay, reporter, host_bytes=host_bytes):
        yield loaded


def check_weights_memory(
    label: str, model: Model, weights_memory: int, *, device: str | None, nf4: bool
) -> None:
    """Check that a model can be run within an amount of memory, without reading its weights.

    Args:
        label: The row's name, for messages.
        model: The model.
        weights_memory: Bytes for weights.
        device: As for :func:`opened_model`.
        nf4: Hold the decoder linears in 4 bits.

    Raises:
        LoramError: It does not fit even layer by layer.
    """
    place = usable_device(device)
    if nf4 or model_bytes(model, device=place, nf4=False) > weights_memory:
        skeleton = _skeleton(model, place, nf4=nf4)
        _layers_that_stay(label, skeleton, weights_memory, _MORE_MEMORY, nf4=nf4)


def _skeleton(model: Model, place: str, *, nf4: bool) -> SkeletonModel:
    dtype = model.dtype.to_torch() if precision(place) == "auto" else torch.float32
    return SkeletonModel(model, dtype=dtype, device=place, nf4=nf4)


def _layers_that_stay(
    label: str, skeleton: SkeletonModel, budget_bytes: int, ways: str, *, nf4: bool
) -> int:
    try:
        return resident_layers(skeleton, budget_bytes)
    except LoramError as error:
        hint = error.hint or (ways if nf4 else f"{ways}, or --quantize nf4")
        raise LoramError(f"row {label}: {error.message}", hint) from error


def check_row(parts: Sequence[Path], opened: Model | None = None) -> Model:
    """Check that a row's model and adapters are whole and made for each other.

    Args:
        parts: The model's directory and, if any, the adapter's.
        opened: The model, where another row has checked it already.

    Returns:
        The model, opened.

    Raises:
        LoramError: One is not whole, or a factor has no module of its shape in the model.
    """
    model = opened or Model.open(parts[0])
    if opened is None:
        model.check_whole(tokenizer=False)
    for adapter in parts[1:]:
        _check_adapter(model, adapter)
    return model


def _check_adapter(model: Model, directory: Path) -> None:
    family, hint = model.family, "pass the adapter that was made for this model"
    # A tied head has no weight of its own, and may have factors all the same.
    tied = {f"{family.lm_head}.weight": model.shapes[f"{family.embedding}.weight"]}
    shapes = {**tied, **model.shapes}
    for module, pair in read_adapter(directory, model.wrapper).pairs.items():
        adapted = family.adapted_weight(module, shapes)
        if adapted is None:
            raise LoramError(f"{directory}: {model.directory} has no module {module}", hint)
        shape = (adapted.rows, adapted.columns)
        factors = (pair.lora_b.shape[0], pair.lora_a.shape[1])
        if factors != shape:
            raise LoramError(
                f"{directory}: its factors have other shapes than {model.directory} has modules: "
                f"{module} {factors} for {tuple(shape)}",
                hint,
            )


def row_tokenizer(parts: Sequence[Path], base: Path) -> Any:
    """The tokenizer of a row's model, or the base's where it has none.

    An adapter that was trained by a chat template of its own is asked by it.

    Raises:
        LoramError: The base has none either, or the model's is damaged.
    """
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    model = parts[0]
    own = any((model / name).exists() for name in names)
    tokenizer = load_tokenizer(model if own else base)
    return with_adapter_template(tokenizer, parts[-1] if len(parts) > 1 else None)


def _adapted(model: Any, adapters: Sequence[Path] | Mapping[str, Path]) -> Any:
    if isinstance(adapters, Mapping):
        return load_beside(model, adapters)
    for adapter in adapters:
        model = load_adapter(model, adapter)
    return model
