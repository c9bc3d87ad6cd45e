"""Whether heads and channels of a family file stand for themselves, as pruning takes them to.

One group of a layer is changed: the rows that the file gives it. Where the layer's output
projection then reads other columns than the file gives that group, the file is wrong: its fused
segments lie in another order, or groups work together.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from loram_cli.arch.spec import ATTENTION_AXES, Family, LayerGeometry, LinearModule
from loram_cli.modeling.load import narrow_class
from loram_cli.modeling.meta_model import native_config
from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.plan import narrowed, pruned_config

_CHANGE = 1.5


def told_apart(
    model: Any, family: Family, config: Mapping[str, Any], ids: torch.Tensor, axis: str
) -> bool:
    """Whether the groups of an axis stand for themselves, in a layer of every kind.

    Args:
        model: A tiny one, on the CPU; it is the same afterwards.
        family: The proposal.
        config: The model's ``config.json``.
        ids: Tokens of shape (1, length).
        axis: ``query`` for key/value heads with their query heads, or ``intermediate``.

    Returns:
        True as well where no layer has such groups, and where a norm runs over all of them: it
        makes each depend on the others by its very nature.
    """
    axes = ATTENTION_AXES if axis == "query" else {"intermediate"}
    if any(norm.shape[0] in axes for norm in family.layer_norms):
        return True
    first: dict[str, tuple[int, LayerGeometry]] = {}
    for i, layer in enumerate(family.geometry(config).layers):
        first.setdefault(layer.kind, (i, layer))
    return all(
        _stand_alone(model, family, i, layer, ids, axis, axes) for i, layer in first.values()
    )


def with_interleaved(family: Family, axis: str) -> Family:
    """The family with the segments of fused modules of an axis the other way round.

    Args:
        family: The proposal.
        axis: See :func:`told_apart`.
    """
    return replace(
        family,
        modules=tuple(
            replace(m, interleaved=not m.interleaved) if len(m.rows) > 1 and axis in m.rows else m
            for m in family.modules
        ),
    )


def _stand_alone(
    model: Any,
    family: Family,
    index: int,
    layer: LayerGeometry,
    ids: torch.Tensor,
    axis: str,
    axes: "frozenset[str] | set[str]",
) -> bool:
    modules = family.layer_modules(layer)
    readers = [m for m in modules if axis in m.columns]
    if len(readers) != 1:
        return True
    count = layer.num_key_value_heads if axis == "query" else layer.intermediate_size
    for group in (0, count - 1):
        kept = LayerKeep((group,), ()) if axis == "query" else LayerKeep((), (group,))
        changed = _changed_columns(model, family, index, layer, kept, readers[0], ids, axes)
        if not changed or not changed <= set(kept.columns(readers[0], layer) or ()):
            return False
    return True


def _changed_columns(
    model: Any,
    family: Family,
    index: int,
    layer: LayerGeometry,
    kept: LayerKeep,
    reader: LinearModule,
    ids: torch.Tensor,
    axes: "frozenset[str] | set[str]",
) -> set[int]:
    """Columns that the output projection reads otherwise once one group's rows are changed."""
    prefix = family.layer_prefix(index)
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(f"{prefix}{reader.name}").register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    saved: list[tuple[Any, torch.Tensor]] = []
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            for module in family.layer_modules(layer):
                if axes.isdisjoint(module.rows):
                    continue
                weight = model.get_submodule(f"{prefix}{module.name}").weight
                saved.append((weight, weight.clone()))
                weight[kept.rows(module, layer)] *= _CHANGE
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)
    moved = (seen[1] - seen[0]).abs().flatten(0, -2).amax(0)
    return set((moved > 1e-3 * moved.max()).nonzero().flatten().tolist())


def narrow_failure(
    family: Family, config: Mapping[str, Any], ids: torch.Tensor
) -> Exception | None:
    """Why a model does not run whose second layer lost half of its heads and channels.

    Args:
        family: The proposal.
        config: A tiny model's ``config.json``.
        ids: Tokens of shape (1, length).

    Returns:
        The error; None where it runs, or where the layer has neither.
    """
    geometry = family.geometry(config)
    layer = geometry.layers[1]
    if not layer.has_attention and not layer.has_mlp:
        return None
    widths = (geometry.layers[0], narrowed(layer, 0.5), *geometry.layers[2:])
    try:
        native = native_config(pruned_config(config, geometry, widths), torch.float32)
        narrow: Any = narrow_class(family)
        with torch.no_grad():
            narrow(native).eval()(input_ids=ids, use_cache=False)
    except Exception as error:
        # Each class has its own way to refuse a width.
        return error
    return None
