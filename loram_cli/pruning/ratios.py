"""Own ratios per layer: what a plan file says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loram_cli.arch.spec import Geometry, LayerGeometry
from loram_cli.errors import UsageError
from loram_cli.pruning.plan import narrowed, pruned_layers
from loram_cli.schema import spec_from_mapping

# Far more layers than any model has; a longer number would be counted through for hours.
_MOST_DIGITS = 4
_LAYERS = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True)
class LayerRatio:
    """Shares of one layer's groups that are dropped; what is not named stays whole.

    Attributes:
        heads: Of its key/value heads, each with its query heads; in [0, 1).
        mlp: Of its MLP channels; in [0, 1).
    """

    heads: float = 0.0
    mlp: float = 0.0

    def __post_init__(self) -> None:
        for name in ("heads", "mlp"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}: a ratio of {getattr(self, name)} is outside [0, 1)")


@dataclass(frozen=True)
class RatioPlan:
    """A plan file, parsed.

    Attributes:
        named: Ratio by layer index, for the layers that the file names.
        default: Ratio of every other layer between the first and the last few; None: whole.
        where: The file, for errors.
        keys: The key that names a layer, for errors.
    """

    named: Mapping[int, LayerRatio]
    default: LayerRatio | None
    where: str
    keys: Mapping[int, str]

    @classmethod
    def from_mapping(cls, data: Any, where: str) -> "RatioPlan":
        """Check a parsed file: ``default`` and ``layers``, by index (``7``) or range (``4-9``).

        A ratio is a number, for heads and MLP alike, or a mapping of ``heads`` and ``mlp``.

        Raises:
            UsageError: An unknown key, a wrong type, a ratio out of range, a layer named twice.
        """
        if not isinstance(data, Mapping):
            raise UsageError(f"{where}: expected a mapping of layers to ratios", _EXAMPLE)
        raw = spec_from_mapping(_PlanFile, {str(k): v for k, v in data.items()}, where)
        if raw.default is None and not raw.layers:
            raise UsageError(f"{where}: neither 'default' nor 'layers' is given", _EXAMPLE)
        named: dict[int, LayerRatio] = {}
        keys: dict[int, str] = {}
        for key, value in raw.layers.items():
            ratio = _ratio(value, f"{where}: layers.{key}")
            for i in _indices(key, f"{where}: layers.{key}"):
                if i in named:
                    raise UsageError(
                        f"{where}: layers.{key}: layer {i} is in layers.{keys[i]} already"
                    )
                named[i], keys[i] = ratio, key
        default = None if raw.default is None else _ratio(raw.default, f"{where}: default")
        return cls(named, default, where, keys)

    def widths(
        self, geometry: Geometry, keep_first: int, keep_last: int, multiple_of: int = 1
    ) -> tuple[LayerGeometry, ...]:
        """Widths of every layer of a model.

        Raises:
            UsageError: A layer that the model does not have, or nothing left of one.
        """
        count = len(geometry.layers)
        for i, key in self.keys.items():
            if i >= count:
                raise UsageError(
                    f"{self.where}: layers.{key}: the model's layers are 0 to {count - 1}"
                )
        others = range(0)
        if self.default is not None:
            others = pruned_layers(count, keep_first, keep_last)
        after = []
        for i, layer in enumerate(geometry.layers):
            ratio = self.named.get(i, self.default if i in others else None)
            what = f"layers.{self.keys[i]}" if i in self.keys else "default"
            after.append(
                layer
                if ratio is None
                else narrowed(layer, ratio.heads, ratio.mlp, f"{self.where}: {what}", multiple_of)
            )
        return tuple(after)


_EXAMPLE = "such as 'default: 0.5' and 'layers: {4-9: {heads: 0.25, mlp: 0.6}, 10: 0}'"


@dataclass(frozen=True)
class _PlanFile:
    default: Any = None
    layers: dict[str, Any] = field(default_factory=dict)


def _ratio(value: Any, where: str) -> LayerRatio:
    try:
        if isinstance(value, Mapping):
            return spec_from_mapping(LayerRatio, {str(k): v for k, v in value.items()}, where)
        both = spec_from_mapping(LayerRatio, {"heads": value, "mlp": value}, where)
    except UsageError as error:
        if error.message.startswith(where):
            raise
        raise UsageError(f"{where}: {error.message}", error.hint) from error
    return both


def _indices(key: str, where: str) -> range:
    match = _LAYERS.fullmatch(key)
    if match is None:
        raise UsageError(f"{where}: not a layer", "write an index such as 7, or a range, 4-9")
    if max(len(number or "") for number in match.groups()) > _MOST_DIGITS:
        raise UsageError(f"{where}: no model has so many layers")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UsageError(f"{where}: the range ends before it begins")
    return range(first, last + 1)
