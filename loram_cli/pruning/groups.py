"""Keep indices: from kept groups of a layer to rows and columns of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loram_cli.arch.spec import (
    PRUNED_AXES,
    Axis,
    Family,
    LayerGeometry,
    LayerTensor,
    LinearModule,
)
from loram_cli.errors import LoramError

# In a manifest's keep indices, beside those of single layers: the base's layers that are left.
_LAYERS, _KEPT = "layers", "kept"


def layer_keeps(keep: Mapping[str, Any]) -> "dict[int, LayerKeep]":
    """What stays of each narrowed layer, by the base's layer index, from a manifest.

    Raises:
        LoramError: One of the lists is absent.
    """
    return {int(i): LayerKeep.from_mapping(k) for i, k in keep.items() if i != _LAYERS}


def kept_layers(keep: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The base's index of each layer of a model that lost whole layers; None where none went."""
    return tuple(keep[_LAYERS][_KEPT]) if _LAYERS in keep else None


def layers_record(kept: tuple[int, ...]) -> dict[str, dict[str, list[int]]]:
    """The keep indices of a model that lost whole layers, for a manifest."""
    return {_LAYERS: {_KEPT: list(kept)}}


@dataclass(frozen=True)
class LayerKeep:
    """What stays of one layer.

    Attributes:
        key_value_heads: Sorted indices of the kept key/value heads; each one's query heads stay.
        intermediate: Sorted indices of the kept MLP channels.
        experts: Sorted indices of the kept experts; None where all stay, or there are none.
    """

    key_value_heads: tuple[int, ...]
    intermediate: tuple[int, ...]
    experts: tuple[int, ...] | None = None

    @classmethod
    def whole(cls, layer: LayerGeometry) -> "LayerKeep":
        """All that a layer has."""
        return cls(tuple(range(layer.num_key_value_heads)), tuple(range(layer.intermediate_size)))

    @classmethod
    def from_mapping(cls, data: Mapping[str, list[int]]) -> "LayerKeep":
        """Read back from a manifest.

        Raises:
            LoramError: One of the two lists is absent.
        """
        try:
            experts = tuple(data["experts"]) if "experts" in data else None
            return cls(tuple(data["key_value_heads"]), tuple(data["intermediate"]), experts)
        except KeyError as error:
            raise LoramError(f"the keep indices of a layer lack {error}") from error

    def to_mapping(self) -> dict[str, list[int]]:
        """Plain form for a manifest."""
        experts = {} if self.experts is None else {"experts": list(self.experts)}
        return {
            "key_value_heads": list(self.key_value_heads),
            "intermediate": list(self.intermediate),
            **experts,
        }

    def axis_indices(self, axis: Axis, layer: LayerGeometry) -> list[int]:
        """Kept indices along an axis of the *unpruned* layer.

        Args:
            axis: A width, or a product, which stays whole.
            layer: The layer's widths before pruning.
        """
        if axis == "intermediate":
            return list(self.intermediate)
        if axis == "experts":
            return list(range(layer.num_experts) if self.experts is None else self.experts)
        if axis not in PRUNED_AXES:
            return list(range(layer.axis_units(axis)))
        return self._of_heads(layer.axis_units(axis) // layer.num_key_value_heads)

    def widths(self, layer: LayerGeometry) -> LayerGeometry:
        """The layer's widths once the rest is gone.

        Args:
            layer: The layer's widths before pruning.
        """
        narrow = replace(
            layer,
            num_attention_heads=len(self.key_value_heads) * layer.queries_per_key_value,
            num_key_value_heads=len(self.key_value_heads),
            intermediate_size=len(self.intermediate),
        )
        return narrow if self.experts is None else with_experts(narrow, len(self.experts))

    def rows(self, module: LinearModule, layer: LayerGeometry) -> list[int] | None:
        """Kept output features of a module, or None when all stay."""
        if module.interleaved:
            units = sum(layer.axis_units(axis) for axis in module.rows)
            return self._of_heads(units // layer.num_key_value_heads)
        return self._segments(module.rows, layer)

    def columns(self, module: LinearModule, layer: LayerGeometry) -> list[int] | None:
        """Kept input features of a module, or None when all stay."""
        return self._segments(module.columns, layer)

    def tensor_rows(self, tensor: LayerTensor, layer: LayerGeometry) -> list[int] | None:
        """Kept indices along the first axis of a norm or the like, or None when all stay."""
        axis = tensor.shape[0] if tensor.shape else None
        return self._segments((axis,), layer) if isinstance(axis, str) else None

    def tensor_columns(self, tensor: LayerTensor, layer: LayerGeometry) -> list[int] | None:
        """Kept indices along the second axis where it runs over experts, or None."""
        if tensor.shape[1:2] != ("experts",):
            return None
        return self.axis_indices("experts", layer)

    def _of_heads(self, width: int) -> list[int]:
        """Kept indices of an axis that has ``width`` of them for each key/value head."""
        return [group * width + i for group in self.key_value_heads for i in range(width)]

    def _segments(self, axes: tuple[Axis, ...], layer: LayerGeometry) -> list[int] | None:
        if PRUNED_AXES.isdisjoint(axes):
            return None
        indices: list[int] = []
        start = 0
        for axis in axes:
            indices.extend(start + i for i in self.axis_indices(axis, layer))
            start += layer.axis_units(axis)
        return indices


def with_experts(layer: LayerGeometry, count: int) -> LayerGeometry:
    """A layer's widths with fewer experts, of which a token has no more than it can reach.

    Args:
        layer: The widths with all of them.
        count: How many stay, equally many in every group.
    """
    reached = count // layer.expert_groups * layer.groups_chosen
    return replace(layer, num_experts=count, top_k=min(layer.top_k, reached))


def params_per_group(
    family: Family, config: Mapping[str, Any], layer: LayerGeometry
) -> dict[str, int]:
    """How many parameters dropping one group of a layer frees, biases included.

    Args:
        family: Tells which axis of which module runs over which groups.
        config: The base's ``config.json``; it tells which biases exist.
        layer: The layer's widths before pruning.

    Returns:
        For ``key_value`` (a head with its query heads) and for ``intermediate``, as far as the
        layer has them.
    """

    def params(kept: LayerGeometry) -> int:
        shapes = family.layer_shapes(0, kept, config)
        return sum(math.prod(shape) for shape in shapes.values())

    whole = params(layer)
    heads, channels = layer.num_key_value_heads - 1, layer.intermediate_size - 1
    freed = {}
    if layer.has_attention:
        one_head = LayerKeep((0,), tuple(range(layer.intermediate_size))).widths(layer)
        freed["key_value"] = (whole - params(one_head)) // heads if heads else 1
    if layer.has_mlp:
        one_channel = LayerKeep(tuple(range(layer.num_key_value_heads)), (0,)).widths(layer)
        freed["intermediate"] = (whole - params(one_channel)) // channels if channels else 1
    return freed
