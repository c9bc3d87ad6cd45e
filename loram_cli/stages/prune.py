"""Prune a base checkpoint: whole key/value groups and MLP channels, written shard by shard."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.stages.common import (
    StageResult,
    check_free_disk,
    check_out_of_tree,
    stage_run,
)

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family, Geometry, LayerGeometry, LinearModule
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.checkpoint.writer import TensorPlan
    from loram_cli.pruning.groups import LayerKeep
    from loram_cli.pruning.scores import SalienceSums


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """How to prune.

    Attributes:
        model: The base's directory.
        out: Where the pruned checkpoint goes.
        strategy: ``rand`` draws groups, ``stru`` ranks them.
        ratio: Share of groups to drop in every pruned layer, in (0, 1).
        keep_first: Layers at the input side that stay whole.
        keep_last: Layers at the output side that stay whole.
        importance: How ``stru`` ranks: first-order ``taylor``, or ``l2`` magnitude (no data).
        calibration: Text for ``taylor``: a path, a data set id, or ``demo:calibration``.
        calibration_samples: Windows of text.
        calibration_length: Tokens per window.
        seed: Decides the draw and the windows.
        max_shard_bytes: Upper bound on one shard of the output.
        force: Replace an existing output.
    """

    model: Path
    out: Path
    strategy: Literal["rand", "stru"] = "stru"
    ratio: float = 0.65
    keep_first: int = 4
    keep_last: int = 2
    importance: Literal["taylor", "l2"] = "taylor"
    calibration: str | None = None
    calibration_samples: int = 10
    calibration_length: int = 128
    seed: int = 42
    max_shard_bytes: int = 5 * 10**9
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"--ratio {self.ratio} is outside (0, 1)")
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} cannot be negative")
        for name in ("calibration_samples", "calibration_length", "max_shard_bytes"):
            if getattr(self, name) < (2 if name == "calibration_length" else 1):
                raise UsageError(f"--{name.replace('_', '-')} is too low")
        if self.needs_calibration and self.calibration is None:
            raise UsageError(
                "--strategy stru ranks by gradients on text, and no --calibration is given",
                "pass --calibration FILE, or --importance l2, which needs no text",
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether text is needed."""
        return self.strategy == "stru" and self.importance == "taylor"


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
    """

    family: "Family"
    config: dict[str, Any]
    index: "CheckpointIndex"
    before: "Geometry"
    after: "tuple[LayerGeometry, ...]"
    tensors: "dict[str, TensorPlan]"
    base_params: int
    pruned_params: int

    @property
    def out_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def results(self) -> dict[str, Any]:
        """The figures of the plan, for the manifest and ``--dry-run``."""
        changed = [i for i, layer in enumerate(self.before.layers) if layer != self.after[i]]
        return {
            "base_params": self.base_params,
            "pruned_params": self.pruned_params,
            "reduction": round(self.base_params / self.pruned_params, 4),
            "removed_share": round(1 - self.pruned_params / self.base_params, 4),
            "weight_bytes": self.out_bytes,
            "pruned_layers": changed,
            "widths": {
                str(i): [
                    layer.num_attention_heads,
                    layer.num_key_value_heads,
                    layer.intermediate_size,
                ]
                for i, layer in enumerate(self.after)
            },
        }


def plan(spec: PruneSpec) -> PrunePlan:
    """Work out shapes and check everything that can be known before a tensor is read.

    Raises:
        LoramError: The base is not sound, or has no tokenizer, or the disk is too full.
        UsageError: The ratio or the keep flags do not fit the model.
    """
    import math

    from loram_cli.arch.registry import family_for
    from loram_cli.arch.spec import Geometry
    from loram_cli.checkpoint.index import CheckpointIndex, read_config
    from loram_cli.checkpoint.sources import require_tokenizer
    from loram_cli.checkpoint.writer import TensorPlan
    from loram_cli.pruning.plan import layer_widths, per_layer_config

    check_out_of_tree(spec.out, spec.model)
    config = read_config(spec.model)
    family = family_for(config, str(spec.model))
    require_tokenizer(spec.model)
    if config.get("per_layer_config"):
        raise UsageError(f"{spec.model}: is pruned already", "prune the original base model")
    index = CheckpointIndex.open(spec.model)
    expected = _expected_shapes(family, config, spec.model, index)
    before = Geometry.from_config(config)
    after = layer_widths(before, spec.ratio, spec.keep_first, spec.keep_last)
    pruned_config = {
        **config,
        "per_layer_config": per_layer_config(before, after),
        # Family configs check their global widths on load; without this, reading them is refused.
        "allow_global_per_layer_attribute_access": True,
    }
    shapes = family.tensor_shapes(pruned_config)
    tensors = {
        name: TensorPlan(entry.dtype, shapes[name])
        for name, entry in index.tensors.items()
        if name in shapes
    }
    check_free_disk(spec.out, sum(tensor.num_bytes for tensor in tensors.values()))
    return PrunePlan(
        family,
        pruned_config,
        index,
        before,
        after,
        tensors,
        sum(math.prod(shape) for shape in expected.values()),
        sum(math.prod(shape) for shape in shapes.values()),
    )


def run(spec: PruneSpec, reporter: Reporter) -> StageResult:
    """Prune, streaming: ``rand`` and ``l2`` never hold more than a few tensors.

    Raises:
        LoramError: See :func:`plan`; also NaN weights, or unusable calibration text.
    """
    from loram_cli.checkpoint.identity import identify
    from loram_cli.checkpoint.sources import copy_companions

    planned = plan(spec)
    base = {"path": str(spec.model), **identify(spec.model).to_mapping()}
    with stage_run("prune", spec, {"base": base}, spec.model) as stage:
        if stage.finished is not None:
            return stage.finished
        stage.restart_meter()
        keep = _keep_indices(spec, planned, reporter)
        _write_weights(spec, planned, keep, stage.path, reporter)
        (stage.path / "config.json").write_text(json.dumps(planned.config, indent=2) + "\n")
        copy_companions(spec.model, stage.path)
        return stage.commit(
            planned.results(),
            base=base,
            keep={str(i): layer.to_mapping() for i, layer in keep.items()},
        )


def _expected_shapes(
    family: "Family", config: dict[str, Any], model: Path, index: "CheckpointIndex"
) -> dict[str, tuple[int, ...]]:
    expected = family.tensor_shapes(config)
    head = f"{family.lm_head}.weight"
    if head in index.tensors and head not in expected:
        # Some tied checkpoints store the head as well: keep what is there.
        expected[head] = expected[f"{family.embedding}.weight"]
    index.check_shapes(expected, family.is_ignored)
    return expected


def _keep_indices(
    spec: PruneSpec, planned: PrunePlan, reporter: Reporter
) -> "dict[int, LayerKeep]":
    from loram_cli.pruning.plan import pruned_layers
    from loram_cli.pruning.select import keep_highest, keep_random

    layers = pruned_layers(len(planned.before.layers), spec.keep_first, spec.keep_last)
    if spec.strategy == "rand":
        return {
            i: keep_random(planned.before.layers[i], planned.after[i], spec.seed, i) for i in layers
        }
    score = _taylor_scores if spec.needs_calibration else _l2_scores
    scores = score(spec, planned, layers, reporter)
    return {i: keep_highest(scores[i], planned.after[i]) for i in layers}


def _l2_scores(
    spec: PruneSpec, planned: PrunePlan, layers: range, reporter: Reporter
) -> dict[int, Any]:
    from loram_cli.checkpoint.background import read_ahead
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.pruning.scores import l2_sums, layer_scores_from_sums

    scores = {}
    with (
        TensorReader(planned.index) as reader,
        reporter.progress("rank", len(layers), "layer") as bar,
    ):

        def sums(layer: int, module: "LinearModule") -> "SalienceSums":
            name = f"{planned.family.layer_prefix(layer)}{module.name}.weight"
            with read_ahead(chunk for _, chunk in reader.read_chunks(name)) as chunks:
                return l2_sums(chunks)

        for i in layers:
            scores[i] = layer_scores_from_sums(
                planned.family, planned.before.layers[i], partial(sums, i)
            )
            bar.advance()
    return scores


def _taylor_scores(
    spec: PruneSpec, planned: PrunePlan, layers: range, reporter: Reporter
) -> dict[int, Any]:
    from loram_cli.modeling.gradients import loss_gradients
    from loram_cli.modeling.narrow import load_causal_lm, load_tokenizer
    from loram_cli.pruning.calibrate import calibration_windows
    from loram_cli.pruning.scores import layer_scores, taylor_salience
    from loram_cli.training.data import load_text

    assert spec.calibration is not None
    texts = load_text(spec.calibration)
    windows = calibration_windows(
        texts,
        load_tokenizer(spec.model),
        spec.calibration_samples,
        spec.calibration_length,
        spec.seed,
    )
    model = load_causal_lm(spec.model)
    family = planned.family
    names = [
        f"{family.layer_prefix(i)}{module.name}.weight" for i in layers for module in family.modules
    ]
    scores = {}
    with loss_gradients(model, names, windows, reporter) as gradients:
        for i in layers:
            prefix = family.layer_prefix(i)
            scores[i] = layer_scores(
                family,
                planned.before.layers[i],
                lambda module, prefix=prefix: taylor_salience(
                    *gradients[f"{prefix}{module.name}.weight"]
                ).cpu(),
            )
    return scores


def _write_weights(
    spec: PruneSpec,
    planned: PrunePlan,
    keep: "dict[int, LayerKeep]",
    directory: Path,
    reporter: Reporter,
) -> None:
    from loram_cli.checkpoint.background import read_ahead
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.checkpoint.writer import ShardedWriter
    from loram_cli.pruning.slicing import read_kept

    with (
        TensorReader(planned.index) as reader,
        ShardedWriter(directory, planned.tensors, spec.max_shard_bytes) as writer,
        reporter.progress("write", planned.out_bytes / 2**20, "MiB") as progress,
        read_ahead(
            (name, rows)
            for name in planned.tensors
            for rows in read_kept(reader, name, planned.family, planned.before, keep)
        ) as kept,
    ):
        for name, rows in kept:
            writer.write(name, rows)
            progress.advance(rows.nbytes / 2**20)
