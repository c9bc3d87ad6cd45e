"""What pruning will do, known from only config and index."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import LOW_RANK, Family, Geometry
from loram_cli.checkpoint.header import DTYPES
from loram_cli.checkpoint.low_bit import CONFIG_KEY, LowBit
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.writer import TensorPlan
from loram_cli.errors import UsageError
from loram_cli.memory.account import (
    BF16_BYTES,
    count_nonzero_params,
    count_params,
    low_bit_weight_bytes,
)
from loram_cli.pruning.depth import shorter_config, shorter_names, without_last
from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.lowrank import factored_name, low_rank_config
from loram_cli.pruning.plan import pruned_config
from loram_cli.pruning.sparsity import zeros_wanted
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.core.lineage import (
    Source,
    describe_source,
    model_record,
    warn_of_oddities,
)
from loram_cli.stages.core.plan import StagePlan, check_out_of_tree, make_plan
from loram_cli.stages.core.results import CalibrationFigures, PruneResult
from loram_cli.stages.prune.calibration import CalibrationNeeds, calibration_needs
from loram_cli.stages.prune.spec import PruneSpec
from loram_cli.stages.prune.ways import ChosenWay, choose_way
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
        low_bit: How the decoder linears are rounded; None where they are not.
        kept_layers: The base's layers that are left, where whole layers go.
        way: The way that was chosen by memory alone, with its spec; None where the spec told it.
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
    low_bit: LowBit | None = None
    kept_layers: tuple[int, ...] | None = None
    way: ChosenWay | None = None

    @property
    def out_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def with_widths(self, after: Widths) -> "PruneWork":
        """The same work with other widths per layer."""
        config = pruned_config(self.model.config, self.before, after)
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

    def with_layers(self, kept: tuple[int, ...]) -> "PruneWork":
        """The same work on the whole base, with some of its layers left."""
        names = list(self.model.index.tensors)
        sources = shorter_names(self.model.family, names, kept)
        entries, shapes = self.model.index.tensors, self.model.shapes
        tensors = {
            new: _renamed(TensorPlan.like(entries[old]), old, new)
            for new, old in sources.items()
            if old in shapes
        }
        return replace(
            self,
            config=shorter_config(self.model.family, self.model.config, kept),
            after=_without_layers(self.before.layers, kept),
            tensors=tensors,
            pruned_params=sum(math.prod(tensor.shape) for tensor in tensors.values()),
            kept_layers=kept,
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
        return _for_card(
            _figures(
                (self.base_params, self.pruned_params, self.out_bytes),
                self.before.layers,
                self.after,
                self.chosen,
                sparsity=self.sparsity,
                calibration=self.calibrations[0].figures() if self.calibrations else None,
                low_bit=self.low_bit,
            ),
            self.way,
        )


def plan(spec: PruneSpec, reporter: Reporter, *, count: bool = False) -> StagePlan[PruneWork]:
    """Work out shapes and check everything that can be known before a tensor is read.

    Raises:
        LoramError: The base is not sound, or has no tokenizer, or the disk is too full.
        UsageError: The ratio or the keep flags do not fit the model.
    """
    spec = spec.settled()
    check_out_of_tree(spec.out, spec.read)
    model = Model.open(spec.read)
    way = chosen_way(spec, model.config)
    spec = way.spec if way else spec
    source = _source(spec, model)
    model.check_whole()
    warn_of_oddities(model, reporter)
    work = replace(_work(spec, model), way=way)
    scratch_bytes = max((needs.disk_bytes for needs in work.calibrations), default=0)
    return make_plan(
        "prune",
        spec,
        {"base": source.record, **plan_record(spec)},
        work,
        disk_bytes=work.out_bytes + scratch_bytes,
        reads=[read for read in (spec.read, spec.calibration, spec.plan) if read],
        base=source.base,
        keep=source.keep,
        memory_bytes=max((needs.held_bytes for needs in work.calibrations), default=0),
        figures={"result": work.result()} | ({"way": way.said} if way else {}),
    )


def chosen_way(spec: PruneSpec, config: Mapping[str, Any]) -> ChosenWay | None:
    """The pruning that ``--fit-memory`` alone stands for; None where the spec tells the way.

    Raises:
        UsageError: The whole base fits.
    """
    return choose_way(spec, config, lambda told: foresee(told, config)[0])


def foresee(spec: PruneSpec, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], PruneResult]:
    """What pruning a base with a config would give; its weights need not be there.

    Returns:
        The small model's config, and its figures with weights in bf16.

    Raises:
        LoramError: The config is of no known family.
        UsageError: What is asked for does not fit the model.
    """
    way = chosen_way(spec, config)
    if way is not None:
        small, result = foresee(way.spec, config)
        return small, _for_card(result, way)
    family = family_for(config, "the base")
    before = family.geometry(config)
    base_params = count_params(family, config).total
    if spec.zeroes_weights:
        assert spec.ratio is not None
        params = count_nonzero_params(family, config, spec.ratio).total
        sizes = (base_params, params, base_params * BF16_BYTES)
        return config, _figures(sizes, before.layers, before.layers, None, sparsity=spec.ratio)
    if spec.low_bit is not None:
        rounded = {**config, CONFIG_KEY: spec.low_bit.to_mapping()}
        sizes = (base_params, base_params, low_bit_weight_bytes(family, rounded, spec.low_bit))
        widths = before.layers
        return rounded, _figures(sizes, widths, widths, None, low_bit=spec.low_bit)
    if spec.chosen_strategy.factors_linears:
        assert spec.ratio is not None
        small = low_rank_config(family, config, spec.ratio, spec.keep_first, spec.keep_last)
        params = count_params(family, small).total
        sizes = (base_params, params, params * BF16_BYTES)
        return small, _figures(sizes, before.layers, before.layers, None)
    if spec.chosen_strategy.drops_layers:
        kept = _last_dropped(spec, family, config)
        shorter = shorter_config(family, config, kept)
        params = count_params(family, shorter).total
        sizes = (base_params, params, params * BF16_BYTES)
        after = _without_layers(before.layers, kept)
        return shorter, _figures(sizes, before.layers, after, None)
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
    low_bit: LowBit | None = None,
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
        bits=low_bit.bits if low_bit else None,
        group_size=low_bit.group_size if low_bit else None,
        codes=low_bit.codes if low_bit else None,
        pruned_layers=_changed(before, after),
        widths=_widths(after),
        base_widths=_widths(before),
        experts=_experts(before, after),
    )
    return replace(result, **chosen.known(after)) if chosen else result


def _for_card(result: PruneResult, way: ChosenWay | None) -> PruneResult:
    """The result with the card that its way was chosen for."""
    if way is None or way.card_bytes is None:
        return result
    return replace(result, card_bytes=way.card_bytes)


def _source(spec: PruneSpec, model: Model) -> Source:
    """The model to prune, which is a base; one to be rounded may be narrow already.

    Raises:
        UsageError: It is pruned, and what it lacks would not be known of the output.
    """
    narrow = (model.directory / MANIFEST_NAME).is_file() and spec.rounds_weights
    if not narrow:
        _refuse_pruned(model)
        record = model_record(model)
        return Source(record, record)
    source = describe_source(model)
    if model.low_bit or source.sparsity:
        made = "of few bits" if model.low_bit else "a model with zeros, which rounding would fill"
        raise UsageError(f"{model.directory}: is {made} already", "pass a base, or what stru made")
    return source


def _work(spec: PruneSpec, model: Model) -> PruneWork:
    if spec.zeroes_weights:
        return _sparse_work(spec, model)
    if spec.rounds_weights:
        return _rounded_work(spec, model)
    if spec.chosen_strategy.drops_layers:
        return _shorter_work(spec, model)
    if spec.chosen_strategy.factors_linears:
        return _factored_work(spec, model)
    return _narrow_work(spec, model)


def _last_dropped(spec: PruneSpec, family: Family, config: Mapping[str, Any]) -> tuple[int, ...]:
    """As many layers as will stay; which they are is known after ranking."""
    assert spec.ratio is not None
    count = len(family.geometry(config).layers)
    return without_last(count, spec.ratio, spec.keep_first, spec.keep_last)


def _renamed(plan: TensorPlan, old: str, new: str) -> TensorPlan:
    """The plan of a layer's tensor that is written under another layer's name."""
    if not plan.pieces or old == new:
        return plan
    # The names differ only in the layer's index.
    parts = zip(old.split("."), new.split("."), strict=True)
    place, index = next((i, now) for i, (was, now) in enumerate(parts) if was != now)

    def moved(name: str) -> str:
        words = name.split(".")
        return ".".join((*words[:place], index, *words[place + 1 :]))

    pieces = tuple(replace(piece, name=moved(piece.name)) for piece in plan.pieces)
    return replace(plan, pieces=pieces)


def _without_layers(before: Widths, kept: tuple[int, ...]) -> Widths:
    """Widths of the base's layers, with nothing in those that go."""
    return tuple(
        layer
        if i in kept
        else replace(layer, num_attention_heads=0, num_key_value_heads=0, intermediate_size=0)
        for i, layer in enumerate(before)
    )


def _factored_work(spec: PruneSpec, model: Model) -> PruneWork:
    """The base's tensors in the order of the layers, with two in the place of each factored one."""
    assert spec.ratio is not None
    family, entries = model.family, model.index.tensors
    keeps = (spec.keep_first, spec.keep_last)
    config = low_rank_config(family, model.config, spec.ratio, *keeps)
    shapes = family.tensor_shapes(config)
    head = f"{family.lm_head}.weight"
    if model.stored_head_params:
        shapes[head] = model.shapes[head]
    tensors = {
        name: replace(TensorPlan.like(entries[name]), shape=shape)
        if name in entries
        else TensorPlan(entries[factored_name(name, entries)].dtype.to_torch(), shape)
        for name, shape in shapes.items()
    }
    before = sum(math.prod(shape) for shape in model.shapes.values())
    after = sum(math.prod(shape) for shape in shapes.values())
    needs = calibration_needs(spec, model, spec.method)
    layers = model.geometry.layers
    return PruneWork(model, config, model.geometry, layers, tensors, before, after, needs)


def _shorter_work(spec: PruneSpec, model: Model) -> PruneWork:
    params = sum(math.prod(shape) for shape in model.shapes.values())
    entries = model.index.tensors
    whole = PruneWork(
        model,
        model.config,
        model.geometry,
        model.geometry.layers,
        {name: TensorPlan.like(entries[name]) for name in entries if name in model.shapes},
        params,
        params,
        calibration_needs(spec, model, spec.method),
    )
    return whole.with_layers(_last_dropped(spec, model.family, model.config))


def _refuse_pruned(model: Model) -> None:
    directory = model.directory
    # Zeros do not show in a config.
    made = (directory / MANIFEST_NAME).is_file() and Manifest.read(directory).stage
    if (
        model.config.get("per_layer_config")
        or model.config.get(LOW_RANK)
        or made in ("prune", "align")
    ):
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
        calibration_needs(spec, model, spec.experts_method, of_experts=True),
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


def _rounded_work(spec: PruneSpec, model: Model) -> PruneWork:
    """The model's own shapes, in the order of the layers; bytes stand for the decoder linears."""
    low_bit, shapes, linears = spec.low_bit, model.shapes, set(model.linear_names)
    assert low_bit is not None
    entries = model.index.tensors
    tensors = {
        name: TensorPlan(DTYPES["U8"].to_torch(), (shape[0], low_bit.row_bytes(shape[1])))
        if name in linears
        else TensorPlan.like(entries[name])
        for name, shape in shapes.items()
    }
    params = sum(math.prod(shape) for shape in shapes.values())
    return PruneWork(
        model,
        {**model.config, CONFIG_KEY: low_bit.to_mapping()},
        model.geometry,
        model.geometry.layers,
        tensors,
        params,
        params,
        calibration_needs(spec, model, spec.method),
        low_bit=low_bit,
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
