"""An adapter's factors at the full model's shapes: where they belong, and the scatter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loram_cli.arch.experts import AdaptedWeight
from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.lora.scatter import gather, scatter_columns, scatter_experts, scatter_rows
from loram_cli.pruning.groups import LayerKeep, kept_layers, layer_keeps
from loram_cli.reporting import Reporter


@dataclass(frozen=True)
class FullShapes:
    """Where an adapter's factors belong: the base's shapes, and what was kept of them.

    Attributes:
        model: The base.
        shapes: Of its tensors.
        keep: What was kept, by layer.
    """

    model: Model
    shapes: dict[str, tuple[int, ...]]
    keep: dict[int, LayerKeep]
    layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: Model, keep: Mapping[str, Any]) -> "FullShapes":
        """Those of a base, and what a manifest says was kept of it."""
        family = model.family
        shapes = family.tensor_shapes(model.config)
        shapes.setdefault(f"{family.lm_head}.weight", shapes[f"{family.embedding}.weight"])
        return cls(model, shapes, layer_keeps(keep), kept_layers(keep))

    def name_of(self, module: str) -> str:
        """The base's name of a module of the small model, whose layers may count otherwise.

        Raises:
            LoramError: It is of a layer that the small model does not have.
        """
        family = self.model.family
        layer, rest = family.layer_of(module)
        if layer is None or self.layers is None:
            return module
        if layer >= len(self.layers):
            raise LoramError(
                f"adapter module {module}: the model that it was trained on has "
                f"{len(self.layers)} layers"
            )
        return f"{family.layer_prefix(self.layers[layer])}{rest}"

    def adapted(self, module: str) -> AdaptedWeight:
        """The base's weight that a module's factors change.

        Raises:
            LoramError: The base has no such module.
        """
        found = self.model.family.adapted_weight(module, self.shapes)
        if found is None:
            raise LoramError(f"adapter module {module} does not exist in the base")
        return found

    def kept_experts(self, module: str) -> tuple[int, ...]:
        """Of a module that holds factors of experts, those that stayed; else empty."""
        adapted = self.adapted(module)
        found = self.model.family.tensor_named(adapted.tensor)
        if not adapted.experts or found is None:
            return ()
        keep = self.keep.get(found[0])
        everything = tuple(range(adapted.experts))
        return everything if keep is None or keep.experts is None else keep.experts

    def kept(self, module: str) -> tuple[list[int] | None, list[int] | None]:
        """Rows and columns that were kept of a module's weight; None for all."""
        found = self.model.family.module_named(module)
        if found is None or found[0] not in self.keep:
            return None, None
        layer, linear = found
        keep, geometry = self.keep[layer], self.model.geometry.layers[layer]
        return keep.rows(linear, geometry), keep.columns(linear, geometry)


def recover_adapter(small: LoraAdapter, base: FullShapes, reporter: Reporter) -> LoraAdapter:
    """Bring every factor of a pruned model's adapter to the base's shapes.

    Raises:
        LoramError: A module or shape is not the base's, or the check of the result fails.
    """
    pairs = {}
    with reporter.progress("scatter", len(small.pairs), "module") as progress:
        for module, pair in small.pairs.items():
            name = base.name_of(module)
            pairs[name] = _recover_pair(name, pair, base)
            progress.advance()
    return replace(small, pairs={**pairs, **_fresh_pairs(pairs, base)})


def _fresh_pairs(pairs: dict[str, LoraPair], base: FullShapes) -> dict[str, LoraPair]:
    """Factors of the layers that the small model lacked: new ones, which change nothing.

    As PEFT starts them, so that exact steps on the full model can go on from there.
    """
    if base.layers is None:
        return {}
    family = base.model.family
    ranks: dict[str, LoraPair] = {}
    for name, pair in pairs.items():
        prefix, rest = family.split_layer(name)
        if prefix:
            ranks[rest] = pair
    experts = family.experts.factor_modules if family.experts is not None else {}
    fresh: dict[str, LoraPair] = {}
    for i, layer in enumerate(base.model.geometry.layers):
        for module in (*(linear.name for linear in family.layer_modules(layer)), *experts):
            name = f"{family.layer_prefix(i)}{module}"
            adapted = family.adapted_weight(name, base.shapes)
            if i in base.layers or module not in ranks or adapted is None:
                continue
            like = ranks[module].lora_a
            rows, columns = adapted.rows, adapted.columns
            generator = torch.Generator().manual_seed(len(fresh))
            bound = columns**-0.5
            lora_a = (torch.rand(len(like), columns, generator=generator) * 2 - 1) * bound
            lora_b = torch.zeros(rows, len(like), dtype=like.dtype)
            fresh[name] = LoraPair(lora_a.to(like.dtype), lora_b)
    return fresh


def _recover_pair(module: str, pair: LoraPair, base: FullShapes) -> LoraPair:
    adapted = base.adapted(module)
    if adapted.experts:
        return _recover_experts(module, pair, base)
    full_rows, full_columns = adapted.rows, adapted.columns
    rows, columns = base.kept(module)
    lora_a, lora_b = pair.lora_a, pair.lora_b
    try:
        if rows is not None:
            lora_b = scatter_rows(lora_b, rows, full_rows)
        if columns is not None:
            lora_a = scatter_columns(lora_a, columns, full_columns)
    except ValueError as error:
        raise LoramError(
            f"adapter module {module} does not fit the keep indices: {error}"
        ) from error
    if lora_b.shape[0] != full_rows or lora_a.shape[1] != full_columns:
        raise LoramError(
            f"adapter module {module} is {lora_b.shape[0]} x {lora_a.shape[1]}, "
            f"the base's weight {full_rows} x {full_columns}"
        )
    # Equal within the kept indices, and nothing outside them: as many non-zeros as before.
    same = all(
        torch.equal(part, was) and int(now.count_nonzero()) == int(was.count_nonzero())
        for part, now, was in (
            (gather(lora_b, rows, None), lora_b, pair.lora_b),
            (gather(lora_a, None, columns), lora_a, pair.lora_a),
        )
    )
    if not same:
        raise LoramError(
            f"adapter module {module}: the recovered factors do not match the small ones"
        )
    return LoraPair(lora_a, lora_b)


def _recover_experts(module: str, pair: LoraPair, base: FullShapes) -> LoraPair:
    """Factors of the experts that stayed, at their places among all; zeros for the others."""
    experts = base.adapted(module).experts
    try:
        full = scatter_experts(pair, base.kept_experts(module), experts)
    except ValueError as error:
        raise LoramError(
            f"adapter module {module} does not fit the keep indices: {error}"
        ) from error
    for was, now in ((pair.lora_a, full.lora_a), (pair.lora_b, full.lora_b)):
        if int(was.count_nonzero()) != int(now.count_nonzero()):
            raise LoramError(
                f"adapter module {module}: the recovered factors do not match the small ones"
            )
    return full
