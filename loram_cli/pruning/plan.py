"""How wide each layer stays: the paper's ratios turned into head and channel counts."""

import math
from dataclasses import replace

from loram_cli.arch.spec import Geometry, LayerGeometry
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


def narrowed(layer: LayerGeometry, ratio: float) -> LayerGeometry:
    """Widths of one pruned layer at the given ratio.

    ``kv - floor(kv * p)`` key/value heads stay, each with all of its query heads, and
    ``floor(intermediate * (1 - p))`` MLP channels; this reproduces the paper's Tables 4 to 6.

    Raises:
        UsageError: Nothing would be left of the MLP.
    """
    kv_heads = layer.num_key_value_heads - math.floor(layer.num_key_value_heads * ratio + _EPSILON)
    intermediate = math.floor(layer.intermediate_size * (1 - ratio) + _EPSILON)
    if kv_heads < 1 or intermediate < 1:
        raise UsageError(
            f"--ratio {ratio} leaves {kv_heads} key/value heads and {intermediate} MLP channels",
            "pass a lower --ratio",
        )
    queries_per_kv = layer.num_attention_heads // layer.num_key_value_heads
    return replace(
        layer,
        num_attention_heads=kv_heads * queries_per_kv,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
    )


def layer_widths(
    geometry: Geometry, ratio: float, keep_first: int = 4, keep_last: int = 2
) -> tuple[LayerGeometry, ...]:
    """Widths of every layer after structured pruning.

    Args:
        geometry: The base model's widths.
        ratio: The paper's pruning ratio, in (0, 1); 0 leaves everything.
        keep_first: Layers at the input side that stay whole.
        keep_last: Layers at the output side that stay whole.

    Raises:
        UsageError: No layer is left to prune, or nothing is left of one.
    """
    pruned = pruned_layers(len(geometry.layers), keep_first, keep_last)
    return tuple(
        narrowed(layer, ratio) if i in pruned else layer for i, layer in enumerate(geometry.layers)
    )


def per_layer_config(
    geometry: Geometry, widths: tuple[LayerGeometry, ...]
) -> dict[str, dict[str, int]]:
    """The ``per_layer_config`` entry of ``config.json``: only what differs from the base.

    ``head_dim`` is written for every changed layer, since transformers would otherwise derive it
    from the changed head count.
    """
    changed = {}
    for i, (before, after) in enumerate(zip(geometry.layers, widths, strict=True)):
        if before != after:
            changed[str(i)] = {
                "num_attention_heads": after.num_attention_heads,
                "num_key_value_heads": after.num_key_value_heads,
                "head_dim": after.head_dim,
                "intermediate_size": after.intermediate_size,
            }
    return changed
