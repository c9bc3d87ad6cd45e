"""Adapters of a text model inside a multimodal one: the same factors under either names."""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from loram_cli.arch.wrappers import Wrapper
from loram_cli.lora.adapter import LoraAdapter, read_shapes

RENAMED = (
    "target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "exclude_modules",
)  # fmt: skip
"""Settings of PEFT's config that name modules."""


def read_adapter(
    directory: Path, wrapper: Wrapper | None, copies: frozenset[str] = frozenset()
) -> LoraAdapter:
    """Read a PEFT LoRA directory, under the text model's own names.

    Args:
        directory: With ``adapter_config.json``.
        wrapper: Of the model that it belongs to; None for an ordinary one.
        copies: See :meth:`.LoraAdapter.read`.

    Raises:
        LoramError: See :meth:`.LoraAdapter.read`.
    """
    adapter = LoraAdapter.read(directory, copies)
    if wrapper is None:
        return adapter
    renamed = _renamed(adapter, wrapper.text_module)
    return replace(renamed, config={**renamed.config, "target_modules": sorted(renamed.pairs)})


def read_adapter_shapes(
    directory: Path, wrapper: Wrapper | None, copies: frozenset[str] = frozenset()
) -> dict[str, tuple[int, int, int]]:
    """As :func:`.read_shapes`, under the text model's own names."""
    shapes = read_shapes(directory, copies)
    if wrapper is None:
        return shapes
    return {wrapper.text_module(name): shape for name, shape in shapes.items()}


def for_wrapper(adapter: LoraAdapter, wrapper: Wrapper, linears: Collection[str]) -> LoraAdapter:
    """The adapter as stock PEFT takes it for the whole multimodal model.

    Its targets name modules of the text model only: those of the vision tower are called alike.

    Args:
        adapter: Under the text model's own names.
        wrapper: Of the multimodal model.
        linears: The text model's own names of all its decoder linears.
    """
    renamed = _renamed(adapter, wrapper.module)
    targets: list[str] | str = sorted(renamed.pairs)
    parts = sorted({_in_layer(name) for name in adapter.pairs if _in_layer(name)})
    whole = {name for name in linears if _in_layer(name) in parts}
    others = sorted(name for name in adapter.pairs if not _in_layer(name))
    if parts and whole == {name for name in adapter.pairs if _in_layer(name)}:
        inside = "|".join(re.escape(part) for part in parts)
        layers = rf"{re.escape(wrapper.text)}\.layers\.\d+\.({inside})"
        targets = "|".join([layers, *(re.escape(wrapper.module(name)) for name in others)])
    return replace(renamed, config={**renamed.config, "target_modules": targets})


def _in_layer(name: str) -> str:
    """A module's name inside its layer; empty for one outside."""
    found = re.fullmatch(r"model\.layers\.\d+\.(.+)", name)
    return found[1] if found else ""


def _renamed(adapter: LoraAdapter, rename: Callable[[str], str]) -> LoraAdapter:
    """The same factors under other names; what single modules have of their own goes along."""
    rank, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    ranks, alphas = {}, {}
    for name, pair in adapter.pairs.items():
        own_rank, own_alpha = pair.lora_a.shape[0], adapter.alpha(name)
        if own_rank != rank:
            ranks[re.escape(rename(name))] = own_rank
        if own_alpha != alpha:
            alphas[re.escape(rename(name))] = own_alpha
    config = {
        **adapter.config,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }
    return LoraAdapter(config, {rename(name): pair for name, pair in adapter.pairs.items()})
