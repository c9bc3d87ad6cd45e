"""A recovered adapter as a GGUF LoRA file, for ``llama-server --lora``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFType, GGUFWriter, Keys

from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.export.gguf_file import GgufFile
from loram_cli.export.gguf_names import GgufNames, LayerHeads, gguf_facts
from loram_cli.export.gguf_types import FLOATS, encode, type_named
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.lora.wrapped import read_adapter
from loram_cli.runs.output_file import refuse_existing, whole_file


@dataclass(frozen=True)
class AdapterExport:
    """What was written.

    Attributes:
        path: The GGUF file.
        architecture: The GGUF architecture that it states.
        modules: How many modules have factors.
        num_bytes: Of the file; None where it was only checked.
    """

    path: Path
    architecture: str
    modules: int
    num_bytes: int | None


def export_adapter(
    adapter: Path,
    model: Path,
    out: Path,
    *,
    kind: str = "f32",
    force: bool = False,
    dry_run: bool = False,
) -> AdapterExport:
    """Write a recovered adapter as a GGUF LoRA file.

    Args:
        adapter: The PEFT directory that ``recover`` wrote.
        model: The original base; only its ``config.json`` is read.
        out: The file.
        kind: ``f32``, ``f16`` or ``bf16``.
        force: Replace an existing file.
        dry_run: Check everything and write nothing.

    Raises:
        LoramError: The adapter belongs to another base, changes a tied head, or has values that
            the type cannot hold.
        UsageError: An unknown type, or the file exists.
    """
    number_type = type_named(kind, FLOATS)
    refuse_existing(out, force=force, is_ours=_is_adapter(out))
    base = Model.open(model)
    architecture = gguf_facts(base.family).architecture
    factors = read_adapter(adapter, base.wrapper)
    check_shapes(factors, base.family.tensor_shapes(base.config), str(model))
    layers = base.geometry.layers
    heads = (LayerHeads(g.num_attention_heads, g.num_key_value_heads) for g in layers)
    names = GgufNames(base.family, tuple(heads))
    alpha, tensors = adapter_tensors(factors, names)
    if dry_run:
        return AdapterExport(out, architecture, len(factors.pairs), None)
    with whole_file(out, replace=force) as file:
        # The package opens the file itself, by the temporary name.
        writer = GGUFWriter(file.name, architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in tensors.items():
            data = encode(tensor, number_type, f"{adapter}: tensor {name}")
            writer.add_tensor(name, data, raw_dtype=number_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return AdapterExport(out, architecture, len(factors.pairs), out.stat().st_size)


def _is_adapter(path: Path) -> bool:
    """Whether a file is what :func:`export_adapter` writes, and no model."""
    try:
        kind = GgufFile.open(path).value(Keys.General.TYPE)
    except LoramError:
        return False
    return kind == GGUFType.ADAPTER


def adapter_tensors(
    adapter: LoraAdapter, names: GgufNames
) -> tuple[float, dict[str, torch.Tensor]]:
    """The factors under GGUF's names, and the alpha that llama.cpp divides by each one's rank.

    A GGUF file has one alpha. Where modules differ (``alpha_pattern``, rsLoRA with
    ``rank_pattern``), the rest of a module's scaling is multiplied into its ``lora_B``.

    Returns:
        alpha, and float32 tensors ``NAME.lora_a`` of shape (r, in), ``NAME.lora_b`` (out, r).
    """
    alphas = {m: adapter.scaling(m) * p.lora_a.shape[0] for m, p in adapter.pairs.items()}
    # llama.cpp takes alpha 0 for "no alpha", so that a scaling of 0 goes into lora_B.
    shared = next((alpha for alpha in alphas.values() if alpha), 1.0)
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in adapter.pairs.items():
        name, ordered = names.tensor(module), names.reordered(module, pair)
        rest = alphas[module] / shared
        tensors[f"{name}.lora_a"] = ordered.lora_a.float()
        tensors[f"{name}.lora_b"] = ordered.lora_b.float() * rest
    return shared, tensors


def check_shapes(adapter: LoraAdapter, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise if a module's factors do not fit the base's weight.

    Args:
        adapter: The factors.
        shapes: Of the base's tensors, by name.
        where: The base, for the message.

    Raises:
        LoramError: A module is absent or has another shape; a tied head, which shares its tensor
            with the embedding, counts as absent.
    """
    for module, pair in adapter.pairs.items():
        shape: Any = shapes.get(f"{module}.weight")
        if shape is None:
            raise LoramError(
                f"adapter module {module}: {where} has no such weight, or ties it to another",
                "llama.cpp applies no adapter to a tied head; merge it: --merge-into BASE.gguf",
            )
        check_fit(module, pair, shape, where)


def check_fit(module: str, pair: LoraPair, shape: tuple[int, ...], where: str) -> None:
    """Raise if the factors' product has another shape than the weight.

    Raises:
        LoramError: It has.
    """
    product = (pair.lora_b.shape[0], pair.lora_a.shape[1])
    if product != shape:
        raise LoramError(
            f"adapter module {module} is {product[0]} x {product[1]}, the weight in {where} "
            f"{' x '.join(map(str, shape))}",
            "pass the base that was pruned, and the adapter that 'loram recover' wrote",
        )
