"""What pruning will do, known from config and index alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Geometry
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.writer import TensorPlan
from loram_cli.errors import UsageError
from loram_cli.memory.account import BF16_BYTES, count_nonzero_params, count_params
from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.plan import pruned_config
from loram_cli.pruning.sparsity import zeros_wanted
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.core.lineage import model_record
from loram_cli.stages.core.plan import StagePlan, check_out_of_tree, make_plan
from loram_cli.stages.core.results import CalibrationFigures, PruneResult
from loram_cli.stages.prune.calibration import CalibrationNeeds, calibration_needs
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.stages.prune.widths import ChosenWidths, Widths, choose_widths, plan_record


@dataclass(frozen=True)
class PruneWork:
    """A pruning as far as config and index tell.

    Attributes:
        model: The base.
        config: Of the output.
        before: The base's widths.
        after: Widths per layer after pruning.
        tensors: Every output tensor, in writing order.
        base_params: Parameters of the base.
        pruned_params: Parameters of the output.
        calibration: What calibration reads and holds; None without it.
        expert_calibration: The same of the ranking of experts.
        sparsity: Share of zeros in the decoder linears; ``pruned_params`` are then what is not
            zero, and the tensors stay as large as they were.
        chosen: How the widths came about; None where they stay.
    """

    model: Model
    config: Mapping[str, Any]
    before: Geometry
    after: Widths
    tensors: dict[str, TensorPlan]
    base_params: int
    pruned_params: int
    calibration: CalibrationNeeds | None = None
    expert_calibration: CalibrationNeeds | None = None
    sparsity: float = 0.0
    chosen: ChosenWidths | None = None

    @property
    def out_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def with_widths(self, after: Widths) -> "PruneWork":
        """The same work with other widths per layer."""
        config = pruned_config(self.config, self.before, after)
        shapes = self.model.family.tensor_shapes(config)
        # A head stored beside a tied embedding is no tensor of the family, and stays as it is.
        tensors = {
            name: replace(tensor, shape=shapes.get(name, tensor.shape))
            for name, tensor in self.tensors.items()
        }
        params = sum(math.prod(tensor.shape) for tensor in tensors.values())
        return replace(self, config=config, after=after, tensors=tensors, pruned_params=params)

    def with_keep(self, keep: Mapping[int, LayerKeep]) -> "PruneWork":
        """The same work with the widths of what is kept."""
        layers = enumerate(self.before.layers)
        return self.with_widths(
            tuple(keep[i].widths(layer) if i in keep else layer for i, layer in layers)
        )

    @property
    def calibrations(self) -> list[CalibrationNeeds]:
        """What is calibrated, one after the other."""
        return [needs for needs in (self.calibration, self.expert_calibration) if needs]

    @property
    def pruned_layers(self) -> tuple[int, ...]:
        """Indices of the layers that lose something."""
        return _changed(self.before.layers, self.after)

    def result(self) -> PruneResult:
        """The figures of the work, for the manifest and ``--dry-run``."""
        return _figures(
            (self.base_params, self.pruned_params, self.out_bytes),
            self.before.layers,
            self.after,
            self.chosen,
            sparsity=self.sparsity,
            calibration=self.calibrations[0].figures() if self.calibrations else None,
        )


def plan(spec: PruneSpec, reporter: Reporter, *, count: bool = False) -> StagePlan[PruneWork]:
    """Work out shapes and check everything that can be known before a tensor is read.

    Raises:
        LoramError: The base is not sound, or has no tokenizer, or the disk is too full.
        UsageError: The ratio or the keep flags do not fit the model.
    """
    spec = spec.settled()
    check_out_of_tree(spec.out, spec.model)
    model = Model.open(spec.model)
    _refuse_pruned(model)
    model.check_whole()
    work = _sparse_work(spec, model) if spec.zeroes_weights else _narrow_work(spec, model)
    scratch_bytes = max((needs.disk_bytes for needs in work.calibrations), default=0)
    base = model_record(model)
    return make_plan(
        "prune",
        spec,
        {"base": base, **plan_record(spec)},
        work,
        disk_bytes=work.out_bytes + scratch_bytes,
        reads=[read for read in (spec.model, spec.calibration, spec.plan) if read],
        base=base,
        memory_bytes=max((needs.held_bytes for needs in work.calibrations), default=0),
        figures={"result": work.result()},
    )


def foresee(spec: PruneSpec, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], PruneResult]:
    """What pruning a base with a config would give; its weights need not be there.

    Returns:
        The small model's config, and its figures with weights in bf16.

    Raises:
        LoramError: The config is of no known family.
        UsageError: What is asked for does not fit the model.
    """
    family = family_for(config, "the base")
    before = family.geometry(config)
    base_params = count_params(family, config).total
    if spec.zeroes_weights:
        assert spec.ratio is not None
        params = count_nonzero_params(family, config, spec.ratio).total
        sizes = (base_params, params, base_params * BF16_BYTES)
        return config, _figures(sizes, before.layers, before.layers, None, sparsity=spec.ratio)
    chosen = choose_widths(spec, family, config)
    small = pruned_config(config, before, chosen.after)
    params = count_params(family, small).total
    sizes = (base_params, params, params * BF16_BYTES)
    return small, _figures(sizes, before.layers, chosen.after, chosen)


def _figures(
    sizes: tuple[int, int, int],
    before: Widths,
    after: Widths,
    chosen: ChosenWidths | None,
    *,
    sparsity: float = 0.0,
    calibration: CalibrationFigures | None = None,
) -> PruneResult:
    """The result of a pruning from parameters before and after, and bytes of the output."""
    base_params, params, weight_bytes = sizes
    result = PruneResult(
        base_params=base_params,
        pruned_params=params,
        reduction=round(base_params / params, 4),
        removed_share=round(1 - params / base_params, 4),
        weight_bytes=weight_bytes,
        sparsity=sparsity,
        calibration=calibration,
        pruned_layers=_changed(before, after),
        widths=_widths(after),
        base_widths=_widths(before),
        experts=_experts(before, after),
    )
    return replace(result, **chosen.known(after)) if chosen else result


def _refuse_pruned(model: Model) -> None:
    directory = model.directory
    # Zeros do not show in a config.
    made = (directory / MANIFEST_NAME).is_file() and Manifest.read(directory).stage
    if model.config.get("per_layer_config") or made in ("prune", "align"):
        raise UsageError(f"{directory}: is pruned already", "prune the original base model")


def _narrow_work(spec: PruneSpec, model: Model) -> PruneWork:
    before, shapes = model.geometry, model.shapes
    chosen = choose_widths(spec, model.family, model.config)
    base_params = sum(math.prod(shape) for shape in shapes.values())
    tensors = {
        name: TensorPlan.like(entry)
        for name, entry in model.index.tensors.items()
        if name in shapes
    }
    whole = PruneWork(
        model, model.config, before, before.layers, tensors, base_params, base_params,
        calibration_needs(spec, model, spec.method),
        calibration_needs(spec, model, spec.experts_method),
        chosen=chosen,
    )  # fmt: skip
    return whole.with_widths(chosen.after)


def _sparse_work(spec: PruneSpec, model: Model) -> PruneWork:
    """The base's own shapes, in the order of the layers; zeros take their places."""
    assert spec.ratio is not None
    geometry, shapes = model.geometry, model.shapes
    zeros = 0
    for name in model.linear_names:
        if spec.chosen_strategy.zeros_in_four and shapes[name][1] % 4:
            raise UsageError(
                f"--strategy {spec.strategy}: tensor {name} has {shapes[name][1]} columns, "
                "which is no multiple of 4",
                "pass --strategy unst --ratio 0.5",
            )
        zeros += zeros_wanted(math.prod(shapes[name]), spec.ratio)
    entries = model.index.tensors
    tensors = {name: TensorPlan.like(entries[name]) for name in shapes}
    params = sum(math.prod(shape) for shape in shapes.values())
    return PruneWork(
        model,
        model.config,
        geometry,
        geometry.layers,
        tensors,
        params,
        params - zeros,
        calibration_needs(spec, model, spec.method),
        sparsity=spec.ratio,
    )


def _changed(before: Widths, after: Widths) -> tuple[int, ...]:
    return tuple(i for i, layer in enumerate(before) if layer != after[i])


def _experts(before: Widths, after: Widths) -> dict[str, tuple[int, ...]]:
    """Per layer that loses experts: how many stay, and how many there were."""
    return {
        str(i): (after[i].num_experts, layer.num_experts)
        for i, layer in enumerate(before)
        if layer.has_experts and after[i].num_experts != layer.num_experts
    }


def _widths(layers: Widths) -> dict[str, tuple[int, ...]]:
    return {
        str(i): (layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size)
        for i, layer in enumerate(layers)
    }
