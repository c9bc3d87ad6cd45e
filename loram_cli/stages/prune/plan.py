"""What pruning will do, known from config and index alone."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loram_cli.stages.prune.widths import ChosenWidths

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family, Geometry, LayerGeometry
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.checkpoint.writer import TensorPlan
    from loram_cli.pruning.groups import LayerKeep
    from loram_cli.stages.prune.calibration import CalibrationNeeds


@dataclass(frozen=True)
class PrunePlan:
    """What pruning will do, known from config and index alone.

    Attributes:
        family: The base's family.
        config: The base's ``config.json``.
        index: The base's tensors.
        before: The base's widths.
        after: Widths per layer after pruning.
        tensors: Every output tensor, in writing order.
        base_params: Parameters of the base.
        pruned_params: Parameters of the output.
        calibration: What calibration reads and holds; None without it.
        sparsity: Share of zeros in the decoder linears; ``pruned_params`` are then what is not
            zero, and the tensors stay as large as they were.
        chosen: How the widths came about; None where they stay.
    """

    family: "Family"
    config: dict[str, Any]
    index: "CheckpointIndex"
    before: "Geometry"
    after: "tuple[LayerGeometry, ...]"
    tensors: "dict[str, TensorPlan]"
    base_params: int
    pruned_params: int
    calibration: "CalibrationNeeds | None" = None
    sparsity: float = 0.0
    chosen: ChosenWidths | None = None

    @property
    def out_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def with_widths(self, after: "tuple[LayerGeometry, ...]") -> "PrunePlan":
        """The same plan with other widths per layer.

        Args:
            after: Widths of every layer after pruning.
        """
        import math

        from loram_cli.pruning.plan import pruned_config

        config = pruned_config(self.config, self.before, after)
        shapes = self.family.tensor_shapes(config)
        # A head stored beside a tied embedding is no tensor of the family, and stays as it is.
        tensors = {
            name: replace(tensor, shape=shapes.get(name, tensor.shape))
            for name, tensor in self.tensors.items()
        }
        params = sum(math.prod(tensor.shape) for tensor in tensors.values())
        return replace(self, config=config, after=after, tensors=tensors, pruned_params=params)

    def with_keep(self, keep: "dict[int, LayerKeep]") -> "PrunePlan":
        """The same plan with the widths of what is kept.

        Args:
            keep: What stays of every layer that loses something.
        """
        layers = enumerate(self.before.layers)
        return self.with_widths(
            tuple(keep[i].widths(layer) if i in keep else layer for i, layer in layers)
        )

    @property
    def pruned_layers(self) -> list[int]:
        """Indices of the layers that lose something."""
        return [i for i, layer in enumerate(self.before.layers) if layer != self.after[i]]

    def results(self) -> dict[str, Any]:
        """The figures of the plan, for the manifest and ``--dry-run``."""
        return {
            "base_params": self.base_params,
            "pruned_params": self.pruned_params,
            "reduction": round(self.base_params / self.pruned_params, 4),
            "removed_share": round(1 - self.pruned_params / self.base_params, 4),
            "weight_bytes": self.out_bytes,
            "sparsity": self.sparsity,
            "calibration": self.calibration.to_mapping() if self.calibration else None,
            **(self.chosen.to_mapping(self.after) if self.chosen else {}),
            "pruned_layers": self.pruned_layers,
            "widths": _widths(self.after),
            "base_widths": _widths(self.before.layers),
        }


def _widths(layers: "tuple[LayerGeometry, ...]") -> dict[str, list[int]]:
    return {
        str(i): [layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size]
        for i, layer in enumerate(layers)
    }
