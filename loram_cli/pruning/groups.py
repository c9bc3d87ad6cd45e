"""Keep indices: from kept groups of a layer to rows and columns of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loram_cli.arch.spec import Axis, Family, LayerGeometry, LinearModule
from loram_cli.errors import LoramError


@dataclass(frozen=True)
class LayerKeep:
    """What stays of one layer.

    Attributes:
        key_value_heads: Sorted indices of the kept key/value heads; each one's query heads stay.
        intermediate: Sorted indices of the kept MLP channels.
    """

    key_value_heads: tuple[int, ...]
    intermediate: tuple[int, ...]

    @classmethod
    def from_mapping(cls, data: Mapping[str, list[int]]) -> "LayerKeep":
        """Read back from a manifest.

        Raises:
            LoramError: One of the two lists is absent.
        """
        try:
            return cls(tuple(data["key_value_heads"]), tuple(data["intermediate"]))
        except KeyError as error:
            raise LoramError(f"the keep indices of a layer lack {error}") from error

    def to_mapping(self) -> dict[str, list[int]]:
        """Plain form for a manifest."""
        return {
            "key_value_heads": list(self.key_value_heads),
            "intermediate": list(self.intermediate),
        }

    def axis_indices(self, axis: Axis, layer: LayerGeometry) -> list[int]:
        """Kept indices along an axis of the *unpruned* layer.

        Args:
            axis: ``query``, ``key_value`` or ``intermediate``.
            layer: The layer's widths before pruning.
        """
        if axis == "intermediate":
            return list(self.intermediate)
        heads_per_group = (
            layer.num_attention_heads // layer.num_key_value_heads if axis == "query" else 1
        )
        width = heads_per_group * layer.head_dim
        return [group * width + i for group in self.key_value_heads for i in range(width)]

    def widths(self, layer: LayerGeometry) -> LayerGeometry:
        """The layer's widths once the rest is gone.

        Args:
            layer: The layer's widths before pruning.
        """
        queries_per_kv = layer.num_attention_heads // layer.num_key_value_heads
        return replace(
            layer,
            num_attention_heads=len(self.key_value_heads) * queries_per_kv,
            num_key_value_heads=len(self.key_value_heads),
            intermediate_size=len(self.intermediate),
        )

    def rows(self, module: LinearModule, layer: LayerGeometry) -> list[int] | None:
        """Kept output features of a module, or None when all stay."""
        return self._segments(module.rows, layer)

    def columns(self, module: LinearModule, layer: LayerGeometry) -> list[int] | None:
        """Kept input features of a module, or None when all stay."""
        return self._segments(module.columns, layer)

    def _segments(self, axes: tuple[Axis, ...], layer: LayerGeometry) -> list[int] | None:
        if not axes:
            return None
        indices: list[int] = []
        start = 0
        for axis in axes:
            indices.extend(start + i for i in self.axis_indices(axis, layer))
            start += layer.axis_units(axis)
        return indices


def params_per_group(
    family: Family, config: Mapping[str, Any], layer: LayerGeometry
) -> dict[str, int]:
    """How many parameters dropping one group of a layer frees, biases included.

    Args:
        family: Tells which axis of which module runs over which groups.
        config: The base's ``config.json``; it tells which biases exist.
        layer: The layer's widths before pruning.

    Returns:
        For ``key_value`` (a head with its query heads) and for ``intermediate``.
    """

    def params(kept: LayerGeometry) -> int:
        shapes = family.layer_shapes(0, kept, config)
        return sum(math.prod(shape) for shape in shapes.values())

    whole = params(layer)
    one_head = LayerKeep((0,), tuple(range(layer.intermediate_size))).widths(layer)
    one_channel = LayerKeep(tuple(range(layer.num_key_value_heads)), (0,)).widths(layer)
    heads, channels = layer.num_key_value_heads - 1, layer.intermediate_size - 1
    return {
        "key_value": (whole - params(one_head)) // heads if heads else 1,
        "intermediate": (whole - params(one_channel)) // channels if channels else 1,
    }
