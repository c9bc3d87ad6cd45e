"""How wide each layer stays: the paper's ratios turned into head and channel counts."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loram_cli.arch.spec import EXPERT_WIDTHS, WIDTHS, Geometry, LayerGeometry
from loram_cli.errors import UsageError

# 0.95 * 20 is 18.999999999999996 in binary floating point; floor must still give 19.
_EPSILON = 1e-9


def pruned_layers(num_hidden_layers: int, keep_first: int, keep_last: int) -> range:
    """Indices of the layers that are pruned: all but the first and last few (paper, section 3.1).

    Raises:
        UsageError: No layer is left to prune.
    """
    if num_hidden_layers <= keep_first + keep_last:
        raise UsageError(
            f"the model has {num_hidden_layers} layers; keeping the first {keep_first} and last "
            f"{keep_last} whole leaves none to prune",
            "lower --keep-first and --keep-last",
        )
    return range(keep_first, num_hidden_layers - keep_last)


def narrowed(
    layer: LayerGeometry,
    heads_ratio: float,
    mlp_ratio: float | None = None,
    where: str | None = None,
    multiple_of: int = 1,
) -> LayerGeometry:
    """Widths of one pruned layer at the given ratio.

    ``kv - floor(kv * p)`` key/value heads stay, each with all of its query heads, and
    ``floor(intermediate * (1 - p))`` MLP channels; this reproduces the paper's Tables 4 to 6.
    ``multiple_of`` departs from them: rows of bf16 that are no multiple of 16 bytes, as the paper's
    4838 channels, are kept from the fastest kernels of a GPU.

    Args:
        layer: The layer's widths before pruning.
        heads_ratio: Share of its key/value heads that goes.
        mlp_ratio: Share of its MLP channels that goes; None for the same.
        where: What set the ratio, for the error; None for the flag.
        multiple_of: The channels that stay are rounded up to a multiple of so many, to no more than
            there are.

    Raises:
        UsageError: Nothing would be left of the heads or of the MLP.
    """
    mlp_ratio = heads_ratio if mlp_ratio is None else mlp_ratio
    kv, intermediate = layer.num_key_value_heads, layer.intermediate_size
    kv_heads = kv - math.floor(kv * heads_ratio + _EPSILON) if layer.has_attention else kv
    if layer.has_mlp:
        intermediate = math.floor(intermediate * (1 - mlp_ratio) + _EPSILON)
    if kv_heads < 1 or intermediate < 1:
        raise UsageError(
            f"{where or f'--ratio {heads_ratio}'} leaves {kv_heads} key/value heads and "
            f"{intermediate} MLP channels",
            "pass a lower --ratio" if where is None else "write a lower ratio",
        )
    rounded_up = -(-intermediate // multiple_of) * multiple_of
    return replace(
        layer,
        num_attention_heads=kv_heads * layer.queries_per_key_value,
        num_key_value_heads=kv_heads,
        intermediate_size=min(rounded_up, layer.intermediate_size),
    )


def layer_widths(
    geometry: Geometry,
    ratio: float,
    keep_first: int = 4,
    keep_last: int = 2,
    multiple_of: int = 1,
    plain: bool = False,
) -> tuple[LayerGeometry, ...]:
    """Widths of every layer after structured pruning.

    Args:
        geometry: The base model's widths.
        ratio: The paper's pruning ratio, in (0, 1); 0 leaves everything.
        keep_first: Layers at the input side that stay whole.
        keep_last: Layers at the output side that stay whole.
        multiple_of: See :func:`narrowed`.
        plain: Keep as many more heads as it takes for a plain config to state them.

    Raises:
        UsageError: No layer is left to prune, or nothing is left of one.
    """
    pruned = pruned_layers(len(geometry.layers), keep_first, keep_last)
    after = []
    for i, layer in enumerate(geometry.layers):
        small = narrowed(layer, ratio, multiple_of=multiple_of) if i in pruned else layer
        after.append(_with_plain_heads(geometry, layer, small) if plain else small)
    return tuple(after)


def _with_plain_heads(
    geometry: Geometry, layer: LayerGeometry, small: LayerGeometry
) -> LayerGeometry:
    """The pruned layer with the next head count that a plain config can state."""
    for heads in range(small.num_key_value_heads, layer.num_key_value_heads):
        queries = heads * layer.queries_per_key_value
        tried = replace(small, num_key_value_heads=heads, num_attention_heads=queries)
        if geometry.states_heads(tried):
            return tried
    return replace(
        small,
        num_key_value_heads=layer.num_key_value_heads,
        num_attention_heads=layer.num_attention_heads,
    )


def pruned_config(
    config: Mapping[str, Any], geometry: Geometry, widths: tuple[LayerGeometry, ...]
) -> dict[str, Any]:
    """The ``config.json`` of a pruned model: the base's, and what differs.

    Where all layers are alike, their widths stand for the whole model, and the checkpoint is an
    ordinary one that any library loads; else ``per_layer_config`` lists them.

    Args:
        config: The base's ``config.json``.
        geometry: The base's widths.
        widths: Widths of every layer after pruning.
    """
    if geometry.layers[0].num_experts:
        counts, geometry, widths = _common_experts(config, geometry, widths)
        config = {**config, **counts}
        if geometry.layers == widths:
            return dict(config)
    plain = _plain_widths(geometry, widths)
    if plain is not None:
        return {**config, **plain}
    # A width may only differ per layer if it also stands for the whole model, and configs of
    # families that derive the head's width leave it out.
    stated = {"head_dim": geometry.layers[0].head_dim}
    if geometry.keys:
        stated = _stated(geometry.layers[0], geometry.keys)
    return {
        **config,
        **stated,
        "per_layer_config": per_layer_config(geometry, widths),
        # Family configs check their global widths on load; without this, reading them is refused.
        "allow_global_per_layer_attribute_access": True,
    }


def _common_experts(
    config: Mapping[str, Any], geometry: Geometry, widths: tuple[LayerGeometry, ...]
) -> tuple[dict[str, int], Geometry, tuple[LayerGeometry, ...]]:
    """Expert counts that all layers with experts have, put into config, geometry and widths.

    Where layers keep different numbers, the base's own counts stand for the whole model.

    Returns:
        The config's keys, and geometry and widths in which dense layers state the same counts.
    """
    kept = {(w.num_experts, w.top_k) for w in widths if w.has_experts}
    if len(kept) != 1:
        return {}, geometry, widths
    num_experts, top_k = kept.pop()
    stated = [key for key in geometry.count_keys if key in config] or [geometry.count_keys[0]]
    counts = dict.fromkeys(stated, num_experts) | {str(geometry.keys["top_k"]): top_k}
    layers, after = (
        tuple(replace(layer, num_experts=num_experts, top_k=top_k) for layer in model)
        for model in (geometry.layers, widths)
    )
    return counts, replace(geometry, layers=layers), after


def _plain_widths(geometry: Geometry, widths: tuple[LayerGeometry, ...]) -> dict[str, Any] | None:
    """What a plain config states of widths that all layers share; None where it cannot.

    Layers of a kind that has no heads, or no channels, say nothing of them.
    """
    pairs = list(zip(geometry.layers, widths, strict=True))
    if any(replace(before, num_experts=after.num_experts, top_k=after.top_k) != before
           for before, after in pairs):  # fmt: skip
        return None
    stated: dict[str, int] = {}
    heads = {after.num_key_value_heads: (before, after) for before, after in pairs
             if before.has_attention}  # fmt: skip
    channels = {after.intermediate_size for before, after in pairs if before.has_mlp}
    if len(heads) > 1 or len(channels) > 1:
        return None
    for before, after in heads.values():
        if not geometry.states_heads(after):
            return None
        if after.num_key_value_heads != before.num_key_value_heads:
            names = ("num_attention_heads", "num_key_value_heads", "head_dim")
            # With the head's width, which would else follow from the new count.
            stated |= {name: getattr(after, name) for name in names}
    if channels:
        stated["intermediate_size"] = channels.pop()
    others = geometry.with_mlp_width if "intermediate_size" in stated else {}
    # A key that wins over a width must say the same.
    others = {**others, **{a: stated[k] for a, k in geometry.aliases.items() if k in stated}}
    return {geometry.own_keys.get(name, name): value for name, value in stated.items()} | others


def per_layer_config(
    geometry: Geometry, widths: tuple[LayerGeometry, ...]
) -> dict[str, dict[str, int]]:
    """The ``per_layer_config`` entry of ``config.json``: only what differs from the base.

    ``head_dim`` is written for every changed layer, since transformers would otherwise derive it
    from the changed head count.
    """
    return {
        str(i): _stated(after, geometry.keys)
        for i, (before, after) in enumerate(zip(geometry.layers, widths, strict=True))
        if before != after
    }


def _stated(layer: LayerGeometry, keys: Mapping[str, str | None]) -> dict[str, int]:
    """A layer's widths under the keys that ``per_layer_config`` has for them."""
    widths = (*WIDTHS, *EXPERT_WIDTHS) if layer.num_experts else WIDTHS
    return {
        key: getattr(layer, width)
        for width in widths
        if (key := keys.get(width, width)) is not None
    }
