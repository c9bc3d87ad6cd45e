"""Models with their adapters, loaded whole, in 4 bits, or layer by layer where they do not fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.stages.core.lifecycle import check_positive, settle_amount
from loram_cli.units import MIB, format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

    from loram_cli.checkpoint.index import CheckpointIndex

# What is left of the free memory for keys, values and activations, up to half of it.
_LEFT_SHARE = 0.1
_LEFT_BYTES = 768 * MIB
# Of the machine's free memory, for weights that are brought to a GPU from there.
_HOST_SHARE = 0.5
_FP32_BYTES = 4


class RowsSpec(Protocol):
    """What a spec says of the models that it runs.

    Attributes:
        model: The original base.
        rows: Per row its model's directory and, if any, the adapter's.
        device: Where to run; None takes a GPU when there is one.
        quantize: ``nf4`` holds the decoder linears in 4 bits.
        weights_memory: Memory for weights on the device: bytes, or text such as ``20GiB``; None
            takes most of what is free.
    """

    model: Path
    rows: dict[str, tuple[Path, ...]]
    device: str | None
    quantize: Literal["nf4"] | None
    weights_memory: int | str | None


def model_bytes(spec: RowsSpec, model_dir: Path, index: "CheckpointIndex") -> int:
    """What the weights of a row's model take, were all of them in memory.

    Args:
        spec: Of the evaluation.
        model_dir: The model.
        index: Its tensors.
    """
    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import read_config
    from loram_cli.memory.account import BF16_BYTES, nf4_weight_bytes

    on_gpu = _device(spec.device).startswith("cuda")
    if spec.quantize is not None:
        config = read_config(model_dir)
        family = family_for(config, str(model_dir))
        return nf4_weight_bytes(family, config, BF16_BYTES if on_gpu else _FP32_BYTES)
    return index.num_bytes if on_gpu else index.num_params * _FP32_BYTES


@contextmanager
def opened_model(spec: RowsSpec, label: str, reporter: Reporter) -> Iterator[Any]:
    """A row's model with its adapters, in evaluation mode, for the length of the block.

    Args:
        spec: Of the evaluation.
        label: The row.
        reporter: Told where not all of it is in memory.

    Raises:
        LoramError: It cannot be loaded, or does not fit even layer by layer.
    """
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.modeling.free_memory import free_memory_bytes
    from loram_cli.modeling.load import load_causal_lm

    model_dir, *adapters = spec.rows[label]
    device = _device(spec.device)
    index = CheckpointIndex.open(model_dir)
    budget_bytes = spec.weights_memory
    if budget_bytes is None:
        free_bytes = free_memory_bytes(device)
        left_bytes = max(_LEFT_BYTES, int(_LEFT_SHARE * free_bytes))
        budget_bytes = free_bytes - min(free_bytes // 2, left_bytes)
    if spec.quantize is None and model_bytes(spec, model_dir, index) <= budget_bytes:
        model = load_causal_lm(model_dir, dtype=precision(spec.device), device=spec.device)
        yield _with_adapters(model, model_dir, adapters)
        return
    dtype = _dtype(spec, model_dir, index)
    with _in_parts(spec, label, device, dtype, budget_bytes, reporter) as model:
        yield model


def check_row(parts: Sequence[Path]) -> "CheckpointIndex":
    """Check that a row's model and adapters are whole.

    Args:
        parts: The model's directory and, if any, the adapter's.

    Returns:
        The model's tensors.

    Raises:
        LoramError: One is not.
    """
    from loram_cli.lora.adapter import read_shapes
    from loram_cli.stages.core.plan import check_model

    _, _, index = check_model(parts[0], tokenizer=False)
    for adapter in parts[1:]:
        read_shapes(adapter)
    return index


def row_tokenizer(spec: RowsSpec, label: str) -> Any:
    """The tokenizer of a row's model, or the base's where it has none.

    Args:
        spec: Of the evaluation.
        label: The row.

    Raises:
        LoramError: The base has none either.
    """
    from loram_cli.modeling.load import load_tokenizer

    try:
        return load_tokenizer(spec.rows[label][0])
    except LoramError:
        return load_tokenizer(spec.model)


def parse_weights_memory(spec: RowsSpec) -> None:
    """Turn an amount that is written with a unit into bytes.

    Args:
        spec: Just built; changed in place.

    Raises:
        UsageError: It is no amount, or nothing.
    """
    settle_amount(spec, "weights_memory", parse_bytes)
    if spec.weights_memory is not None:
        check_positive(spec, "weights_memory")


def _with_adapters(model: Any, model_dir: Path, adapters: Sequence[Path]) -> Any:
    from loram_cli.training.adapters import load_adapter

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
    return "auto" if _device(device).startswith("cuda") else "float32"


@contextmanager
def _in_parts(
    spec: RowsSpec,
    label: str,
    device: str,
    dtype: "torch.dtype",
    budget_bytes: int,
    reporter: Reporter,
) -> Iterator[Any]:
    from loram_cli.modeling.free_memory import free_memory_bytes
    from loram_cli.modeling.offload import loaded_within, resident_layers, weight_bytes
    from loram_cli.modeling.skeleton import SkeletonModel

    model_dir, *adapters = spec.rows[label]
    skeleton = SkeletonModel(model_dir, dtype=dtype, device=device, nf4=spec.quantize is not None)
    model = _with_adapters(skeleton.model, model_dir, adapters)
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
        yield model


def _dtype(spec: RowsSpec, model_dir: Path, index: "CheckpointIndex") -> "torch.dtype":
    import torch

    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import read_config

    if precision(spec.device) == "float32":
        return torch.float32
    family = family_for(read_config(model_dir), str(model_dir))
    return index.tensors[f"{family.embedding}.weight"].dtype.to_torch()


def _device(device: str | None) -> str:
    from loram_cli.modeling.load import usable_device

    return usable_device(device)
