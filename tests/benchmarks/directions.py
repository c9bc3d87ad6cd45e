"""Whether small models are pushed where the full one is: cosines of their gradients.

    python tests/benchmarks/directions.py --base DIR --data FILE SMALL [SMALL ...]

prints, for each small model that ``prune`` or ``align`` made of the base, its loss on the examples
and the cosine between its gradient and the base's, over the weights that both have: of all layers,
and of those that were changed.

Two measures. The gradient of the fine-tuning loss by each kept weight, before any training: what
LoRA sees first, without the chance of its random start. And the finished updates B A: recovered
against full LoRA's, over the entries that were kept.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Family, Geometry
from loram_cli.checkpoint.index import read_config
from loram_cli.lora.adapter import LoraAdapter
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.pruning.groups import LayerKeep
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.tokens import PadCollator, tokenize_examples

_EXAMPLES = 64


class _Sums:
    """Products of two models' tensors, summed per layer."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}

    def add(self, layer: int, a: torch.Tensor, b: torch.Tensor) -> None:
        sums = self._sums.setdefault(layer, [0.0, 0.0, 0.0])
        for i, product in enumerate((a * b, a * a, b * b)):
            sums[i] += float(product.sum())

    def over(self, layers: Iterable[int]) -> float:
        """The cosine over some layers together."""
        chosen = [self._sums[i] for i in layers]
        return _cosine([sum(sums[i] for sums in chosen) for i in range(3)])

    def cosines(self) -> dict[str, float]:
        """By layer, and over all of them."""
        found = {str(i): _cosine(sums) for i, sums in sorted(self._sums.items())}
        return {**found, "all": self.over(self._sums)}


def _cosine(sums: list[float]) -> float:
    dot, a, b = sums
    return round(dot / (a * b) ** 0.5, 4) if a and b else 0.0


def gradient_cosines(
    base: Path, small: Path, keep: Mapping[str, Any], data: str, length: int
) -> dict[str, float]:
    """Cosine of the two models' gradients of the fine-tuning loss, by their common weights."""
    config = read_config(base)
    family, geometry = family_for(config, str(base)), Geometry.from_config(config)
    full, narrow = (_gradients(directory, family, data, length)[1] for directory in (base, small))
    return _common_cosines(family, geometry, full, narrow, keep).cosines()


def _common_cosines(
    family: Family,
    geometry: Geometry,
    full: Mapping[str, torch.Tensor],
    narrow: Mapping[str, torch.Tensor],
    keep: Mapping[str, Any],
) -> _Sums:
    """Products of the gradients by the weights that both models have."""
    sums = _Sums()
    for name, gradient in narrow.items():
        layer, module = family.module_named(name.removesuffix(".weight"))
        theirs = full[name]
        if str(layer) in keep:
            kept = LayerKeep.from_mapping(keep[str(layer)])
            rows = kept.rows(module, geometry.layers[layer])
            columns = kept.columns(module, geometry.layers[layer])
            theirs = theirs if rows is None else theirs[rows]
            theirs = theirs if columns is None else theirs[:, columns]
        sums.add(layer, gradient, theirs)
    return sums


def _gradients(
    directory: Path, family: Family, data: str, length: int, limit: int = _EXAMPLES
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of a pass of examples, and its gradient by the weight of every linear."""
    model = load_causal_lm(directory, dtype=torch.float32)
    model.requires_grad_(True)
    tokenizer = load_tokenizer(directory)
    examples = load_instructions(data, tokenizer=tokenizer, limit=limit)
    rows = tokenize_examples(examples, tokenizer, length, NullReporter())
    collate = PadCollator(tokenizer.pad_token_id or 0)
    losses = []
    for start in range(0, len(rows), 16):
        batch = {k: v.to(model.device) for k, v in collate(rows[start : start + 16]).items()}
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    return sum(losses) / len(losses), {
        name: parameter.grad.double().cpu()
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and family.module_named(name.removesuffix(".weight"))
    }


def update_cosines(recovered: Path, full: Path) -> dict[str, float]:
    """Cosine of two adapters' updates, over the entries where the first one has any."""
    first, second = LoraAdapter.read(recovered), LoraAdapter.read(full)
    sums = _Sums()
    for name, pair in first.pairs.items():
        found = [part for part in name.split(".") if part.isdigit()]
        if not found or name not in second.pairs:
            continue
        mine = pair.lora_b.double() @ pair.lora_a.double()
        theirs = second.pairs[name].lora_b.double() @ second.pairs[name].lora_a.double()
        sums.add(int(found[0]), mine, theirs * (mine != 0))
    return sums.cosines()


def main() -> None:
    """Compare small models with their base, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("small", type=Path, nargs="+")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", required=True, help="what will be trained on")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=320)
    asked = parser.parse_args()
    config = read_config(asked.base)
    family = family_for(config, str(asked.base))
    geometry = family.geometry(config)
    how = (family, asked.data, asked.max_length, asked.examples)
    loss, full = _gradients(asked.base, *how)
    layers = range(len(geometry.layers))
    print("| small model | loss | cosine, all layers | changed layers |")
    print("| --- | --: | --: | --: |")
    print(f"| base | {loss:.3f} | | |", flush=True)
    for small in asked.small:
        keep = Manifest.read(small).keep
        loss, narrow = _gradients(small, *how)
        sums = _common_cosines(family, geometry, full, narrow, keep)
        changed = [i for i in layers if str(i) in keep] or layers
        print(
            f"| {small} | {loss:.3f} | {sums.over(layers):.2f} | {sums.over(changed):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
