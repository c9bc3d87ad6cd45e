"""Keep indices: from kept groups of a layer to rows and columns of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

from loram_cli.arch.spec import Axis, LayerGeometry, LinearModule
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
