"""Models with their adapters, loaded whole, in 4 bits, or layer by layer where they do not fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import read_shapes
from loram_cli.memory.account import BF16_BYTES, nf4_weight_bytes
from loram_cli.modeling.free_memory import free_memory_bytes
from loram_cli.modeling.load import load_causal_lm, load_tokenizer, usable_device
from loram_cli.modeling.offload import loaded_within, resident_layers, weight_bytes
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import Reporter
from loram_cli.stages.evaluate.spec import RowsSpec
from loram_cli.training.adapters import load_adapter
from loram_cli.units import MIB, format_bytes

# What is left of the free memory for keys, values and activations, up to half of it.
_LEFT_SHARE = 0.1
_LEFT_BYTES = 768 * MIB
# Of the machine's free memory, for weights that are brought to a GPU from there.
_HOST_SHARE = 0.5
_FP32_BYTES = 4


def model_bytes(spec: RowsSpec, model: Model) -> int:
    """What the weights of a row's model take, were all of them in memory.

    Args:
        spec: Of the evaluation.
        model: The model.
    """
    on_gpu = usable_device(spec.device).startswith("cuda")
    if spec.quantize is not None:
        item_bytes = BF16_BYTES if on_gpu else _FP32_BYTES
        return nf4_weight_bytes(model.family, model.config, item_bytes)
    return model.num_bytes if on_gpu else model.num_params * _FP32_BYTES


@contextmanager
def opened_model(spec: RowsSpec, label: str, model: Model, reporter: Reporter) -> Iterator[Any]:
    """A row's model with its adapters, in evaluation mode, for the length of the block.

    Args:
        spec: Of the evaluation.
        label: The row.
        model: Its model, opened.
        reporter: Told where not all of it is in memory.

    Raises:
        LoramError: It cannot be loaded, or does not fit even layer by layer.
    """
    adapters = spec.rows[label][1:]
    device = usable_device(spec.device)
    budget_bytes: int | None = spec.weights_memory
    if budget_bytes is None:
        free_bytes = free_memory_bytes(device)
        left_bytes = max(_LEFT_BYTES, int(_LEFT_SHARE * free_bytes))
        budget_bytes = free_bytes - min(free_bytes // 2, left_bytes)
    if spec.quantize is None and model_bytes(spec, model) <= budget_bytes:
        loaded = load_causal_lm(model, dtype=precision(spec.device), device=spec.device)
        yield _with_adapters(loaded, model.directory, adapters)
        return
    with _in_parts(spec, label, model, device, budget_bytes, reporter) as loaded:
        yield loaded


def check_row(parts: Sequence[Path]) -> Model:
    """Check that a row's model and adapters are whole.

    Args:
        parts: The model's directory and, if any, the adapter's.

    Returns:
        The model, opened.

    Raises:
        LoramError: One is not.
    """
    model = Model.open(parts[0])
    model.check_whole(tokenizer=False)
    check_adapters(parts)
    return model


def check_adapters(parts: Sequence[Path]) -> None:
    """Check that a row's adapters are whole.

    Args:
        parts: The model's directory and, if any, the adapter's.

    Raises:
        LoramError: One is not.
    """
    for adapter in parts[1:]:
        read_shapes(adapter)


def row_tokenizer(spec: RowsSpec, label: str) -> Any:
    """The tokenizer of a row's model, or the base's where it has none.

    Args:
        spec: Of the evaluation.
        label: The row.

    Raises:
        LoramError: The base has none either.
    """
    try:
        return load_tokenizer(spec.rows[label][0])
    except LoramError:
        return load_tokenizer(spec.model)


def _with_adapters(model: Any, model_dir: Path, adapters: Sequence[Path]) -> Any:
    for adapter in adapters:
        try:
            model = load_adapter(model, adapter)
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            raise LoramError(
                f"{adapter}: its factors have other shapes than {model_dir} has modules",
                "pass the adapter that was made for this model",
            ) from error
    return model


def precision(device: str | None) -> str:
    """The type that models are run in: the checkpoint's own on a GPU, else ``float32``."""
    return "auto" if usable_device(device).startswith("cuda") else "float32"


@contextmanager
def _in_parts(
    spec: RowsSpec,
    label: str,
    model: Model,
    device: str,
    budget_bytes: int,
    reporter: Reporter,
) -> Iterator[Any]:
    on_cpu = precision(spec.device) == "float32"
    dtype = torch.float32 if on_cpu else model.dtype.to_torch()
    skeleton = SkeletonModel(model, dtype=dtype, device=device, nf4=spec.quantize is not None)
    loaded = _with_adapters(skeleton.model, model.directory, spec.rows[label][1:])
    try:
        stay = resident_layers(skeleton, budget_bytes)
    except LoramError as error:
        ways = "pass --device cpu" if device.startswith("cuda") else "free some memory"
        if spec.weights_memory is not None:
            ways = "pass a larger --weights-memory"
        if spec.quantize is None:
            ways += ", or --quantize nf4"
        raise LoramError(f"row {label}: {error.message}", error.hint or ways) from error
    layers = len(list(skeleton.layers()))
    if stay < layers:
        smaller = "" if spec.quantize else "; --quantize nf4 makes it about a quarter"
        reporter.warn(
            f"{label}: its weights take {format_bytes(weight_bytes(skeleton))}, and there are "
            f"{format_bytes(budget_bytes)} for them on {device}: {layers - stay} of {layers} "
            f"layers are read anew at every pass, which is slow{smaller}"
        )
    host_bytes = 0
    if device.startswith("cuda"):
        host_bytes = int(_HOST_SHARE * free_memory_bytes("cpu"))
    with loaded_within(skeleton, stay, reporter, host_bytes=host_bytes):
        yield loaded
