"""Whether a correction of the recovered factors brings more than recovery alone.

    python tests/benchmarks/recovery_trials.py --base DIR --full ADAPTER --eval-data FILE \
        ADAPTER [ADAPTER ...]

prints, for each adapter that ``train`` made on a small model of the base, the full model's loss a
token on held-out answers with that adapter corrected in each way, the share of full LoRA's gain
that this keeps, and both once more with the update scaled as ``recover --fit-scale`` does.

=========  ========================================================================================
none       The factors as ``recover`` scatters them.
emloc      Whatever the inputs, the full model's linear gives what the small one's gave, within the
           directions that ``lora_A`` reads: the difference of the two weights there is added to
           the update, up to a limit (EMLoC, arXiv 2506.12015; as its published code does it,
           ``loraCorrection.py`` of hsi-che-lin/EMLoC, whose limit is 3).
inputs     ``lora_B M``, with the rank x rank matrix M of least squares by which ``lora_A`` sees, on
           the full model's inputs, what it saw on the small one's.
moves      ``lora_B`` of least squares by which training moves the linear's outputs in the full
           model as it moved them in the small one: what moved inputs move by themselves included.
=========  ========================================================================================

The last two go through the layers in their order, each on inputs that the corrected layers before
it give, over some of the training examples. All run in bf16 autocast. Only ``lora_B`` changes, and
only its kept rows.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.modeling.layerwise.parts import LayerCalls, ModelParts
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.pruning.least_squares import NormalEquations
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.core.full_shapes import FullShapes, recover_adapter
from loram_cli.stages.recover.scale import best_scale, check_scalable
from loram_cli.stages.train.data import training_rows
from loram_cli.training.adapters import load_adapter, lora_scaling, put_factors
from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.tokens import PadCollator, TokenRow, tokenize_examples
from loram_cli.training.loop.mean_loss import mean_loss

# How much larger than the update a correction may be, by direction.
EMLOC_LIMIT = 3.0
_ROWS_AT_ONCE = 8
# How much a refit pulls towards the factor as it was, as a share of the inputs' mean square.
_RIDGE = 1e-4


def emloc(
    pair: LoraPair, scaling: float, difference: torch.Tensor, limit: float = EMLOC_LIMIT
) -> torch.Tensor:
    """``lora_B`` with which the full weight acts as the small one, where ``lora_A`` reads.

    Args:
        pair: Factors of shapes (r, in) and (out, r).
        scaling: What ``B A`` is multiplied by; 1 in EMLoC's code.
        difference: The full weight less the small one, shape (out, in).
        limit: Mean magnitude of a direction's correction at most, against its update's.

    Returns:
        Shape (out, r), for the same ``lora_A``.
    """
    # A^T = directions diag(sizes) turn, so that B A = update directions^T.
    directions, sizes, turn = torch.linalg.svd(pair.lora_a.double().T, full_matrices=False)
    update = scaling * pair.lora_b.double() @ turn.T * sizes
    correction = difference.double() @ directions
    ratio = correction.abs().mean(0) / update.abs().mean(0)
    corrected = update - correction * (limit / ratio).clamp(max=1.0)
    return (corrected / sizes @ turn / scaling).to(pair.lora_b.dtype)


def refit(start: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The matrix of shape (out, in) that takes inputs (tokens, in) nearest to targets.

    ``start`` where the inputs say nothing.
    """
    equations = NormalEquations(start)
    equations.add(inputs, targets)
    return equations.solve(_RIDGE)


@dataclass(frozen=True)
class _Seen:
    """What a linear with factors gave on all tokens.

    Attributes:
        frozen: Of the frozen weight alone, shape (tokens, out).
        read: Of ``lora_A``, shape (tokens, r).
        out: Of both, shape (tokens, out).
    """

    frozen: torch.Tensor
    read: torch.Tensor
    out: torch.Tensor


class _Walk:
    """Rows of tokens on their way through a model's layers.

    Args:
        model: A PEFT model.
        batches: Token ids with padding on the right, and lengths.
        scale: Of the adapter's update.
    """

    def __init__(
        self, model: Any, batches: Sequence[tuple[torch.Tensor, list[int]]], scale: float = 1.0
    ) -> None:
        self._model, self._scale = model, scale
        self._parts = ModelParts(model)
        self._lengths = [lengths for _, lengths in batches]
        self._hidden: list[torch.Tensor] = []
        self._calls: list[LayerCalls] = []
        for ids, _ in batches:
            hidden, calls = self._parts.enter(ids)
            self._hidden.append(hidden)
            self._calls.append(calls)

    def run(self, index: int, names: Sequence[str], *, leave: bool = True) -> dict[str, _Seen]:
        """Run a layer.

        Args:
            index: Of the layer.
            names: Of the linears that are listened to, within the layer.
            leave: Whether its outputs become the next layer's inputs.
        """
        layer = self._parts.layers[index]
        parts: dict[tuple[str, str], list[torch.Tensor]] = {}
        lengths: list[int] = []

        def listener(name: str, kind: str) -> Callable[..., None]:
            def listen(module: Any, given: Any, out: torch.Tensor) -> None:
                kept = [row[:length] for row, length in zip(out, lengths, strict=True)]
                parts.setdefault((name, kind), []).append(torch.cat(kept).float())

            return listen

        hooks = []
        for name in names:
            linear = layer.get_submodule(name)
            heard = {"frozen": linear.base_layer, "read": linear.lora_A["default"], "out": linear}
            for kind, module in heard.items():
                hooks.append(module.register_forward_hook(listener(name, kind)))
        with torch.no_grad(), _autocast(), lora_scaling(self._model, self._scale):
            for i, calls in enumerate(self._calls):
                lengths = self._lengths[i]
                out = calls.run(index, layer, self._hidden[i])
                if leave:
                    self._hidden[i] = out
        for hook in hooks:
            hook.remove()
        return {
            name: _Seen(*(torch.cat(parts[name, kind]) for kind in ("frozen", "read", "out")))
            for name in names
        }


class Trial:
    """An adapter that was trained on a small model, and the full model with it.

    Args:
        base: The full model.
        adapter: The adapter's directory, whose record tells the small model.
        full: The full model with an adapter of the recovered one's shapes; changed in place.
    """

    def __init__(self, base: Model, adapter: Path, full: Any) -> None:
        manifest = Manifest.read(adapter)
        self.shapes = FullShapes.of(base, manifest.keep)
        if self.shapes.layers is not None:
            raise SystemExit(f"{adapter}: its model lost layers, whose factors have no counterpart")
        self.spec = check_scalable(manifest)
        self.small_adapter = LoraAdapter.read(adapter)
        self.recovered = recover_adapter(self.small_adapter, self.shapes, NullReporter())
        small = load_causal_lm(self.spec.source, dtype=torch.float32, device="cpu")
        self.small = load_adapter(small, adapter)
        self.full = full

    def use(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Put the recovered adapter on the full model, with some of its ``lora_B`` replaced."""
        pairs = {
            name: LoraPair(pair.lora_a, factors.get(name, pair.lora_b))
            for name, pair in self.recovered.pairs.items()
        }
        with tempfile.TemporaryDirectory() as place:
            replace(self.recovered, pairs=pairs).write(Path(place))
            put_factors(self.full, Path(place))

    def emloc(self, limit: float = EMLOC_LIMIT) -> dict[str, torch.Tensor]:
        """``lora_B`` by module, corrected by the difference of the weights."""
        found = {}
        for name, pair in self.small_adapter.pairs.items():
            rows, columns = self.shapes.kept(name)
            weight, small = (_linear(m, name).base_layer.weight for m in (self.full, self.small))
            kept = weight if rows is None else weight[rows]
            kept = kept if columns is None else kept[:, columns]
            scaling = self.small_adapter.scaling(name)
            found[name] = self._at_full(name, emloc(pair, scaling, (kept - small).detach(), limit))
        return found

    def refitted(self, rows: Sequence[TokenRow], *, moves: bool) -> dict[str, torch.Tensor]:
        """``lora_B`` by module, from least squares on what the two models compute.

        Args:
            rows: Tokens to compute on.
            moves: Match how outputs move; else what ``lora_A`` reads.
        """
        self.use({})
        batches = list(_padded(rows))
        small, full = _Walk(self.small, batches), _Walk(self.full, batches)
        still = [_Walk(model, batches, 0.0) for model in (self.small, self.full) if moves]
        found: dict[str, torch.Tensor] = {}
        family, geometry = self.shapes.model.family, self.shapes.model.geometry
        for index, widths in enumerate(geometry.layers):
            prefix = family.layer_prefix(index)
            linears = [
                linear
                for linear in family.layer_modules(widths)
                if f"{prefix}{linear.name}" in self.recovered.pairs
            ]
            names = [linear.name for linear in linears]
            seen = small.run(index, names)
            before = [walk.run(index, names) for walk in still]
            # Those that have the same inputs, which the ones before them decide.
            for _, group in groupby(linears, key=lambda linear: linear.columns):
                together = [linear.name for linear in group]
                for name, now in full.run(index, together, leave=False).items():
                    module = f"{prefix}{name}"
                    kept = self.shapes.kept(module)[0]
                    scaling = self.recovered.scaling(module)
                    lora_b = self.small_adapter.pairs[module].lora_b
                    if moves:
                        moved = now.frozen - before[1][name].frozen
                        moved = moved if kept is None else moved[:, kept]
                        target = seen[name].out - before[0][name].out - moved
                        factor = refit(scaling * lora_b, now.read, target) / scaling
                    else:
                        same = torch.eye(lora_b.shape[1])
                        factor = lora_b.double() @ refit(same, now.read, seen[name].read)
                    found[module] = self._at_full(module, factor)
                    _linear(self.full, module).lora_B["default"].weight.data.copy_(found[module])
            full.run(index, [])
        return found

    def _at_full(self, module: str, factor: torch.Tensor) -> torch.Tensor:
        """Rows that were kept at their places in the base's, zeros elsewhere."""
        whole = torch.zeros_like(self.recovered.pairs[module].lora_b)
        rows = self.shapes.kept(module)[0]
        whole[slice(None) if rows is None else rows] = factor.to(whole.dtype)
        return whole


def _linear(model: Any, module: str) -> Any:
    return model.get_base_model().get_submodule(module)


def _padded(rows: Sequence[TokenRow]) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Token ids of some rows at a time, shape (rows, longest), and the rows' lengths."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    collate = PadCollator(0)
    for start in range(0, len(ordered), _ROWS_AT_ONCE):
        some = ordered[start : start + _ROWS_AT_ONCE]
        yield collate(some)["input_ids"], [len(row.input_ids) for row in some]


@contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def _loss(model: Any, rows: Sequence[TokenRow], scale: float = 1.0) -> float:
    with _autocast(), lora_scaling(model, scale):
        return mean_loss(model, rows)


def corrections(
    trial: Trial, rows: Sequence[TokenRow], ways: Sequence[str]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each way's name, and its ``lora_B`` by module."""
    made: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "none": dict,
        "emloc": trial.emloc,
        "inputs": lambda: trial.refitted(rows, moves=False),
        "moves": lambda: trial.refitted(rows, moves=True),
    }
    for way in ways:
        yield way, made[way]()


def main() -> None:
    """Correct adapters in each way, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, nargs="+", help="made by train on a small model")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--full", type=Path, required=True, help="full LoRA's adapter")
    parser.add_argument("--eval-data", required=True, help="held-out instructions")
    parser.add_argument("--eval-examples", type=int, default=60)
    parser.add_argument("--fit-examples", type=int, default=24, help="for refits")
    parser.add_argument("--scale-examples", type=int, default=24, help="0 leaves scales out")
    parser.add_argument("--ways", nargs="+", default=["none", "emloc", "inputs", "moves"])
    asked = parser.parse_args()
    base, silent = Model.open(asked.base), NullReporter()
    tokenizer = load_tokenizer(asked.base)
    spec = check_scalable(Manifest.read(asked.full))
    held = load_instructions(asked.eval_data, tokenizer=tokenizer)[: asked.eval_examples]
    held_rows = tokenize_examples(held, tokenizer, spec.max_length, silent)
    full = load_causal_lm(base, dtype=torch.float32, device="cpu")
    full = load_adapter(full, asked.full)
    before, best = _loss(full, held_rows, 0.0), _loss(full, held_rows)
    print("| adapter | correction | loss | kept | scale | scaled | kept |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    print(f"| base | | {before:.4f} | 0 | | | |")
    print(f"| full LoRA | | {best:.4f} | 1 | | | |", flush=True)

    def kept(loss: float) -> str:
        return f"{loss:.4f} | {(before - loss) / (before - best):.3f}"

    for adapter in asked.adapter:
        trial = Trial(base, adapter, full)
        draw = max(asked.fit_examples, asked.scale_examples)
        rows = training_rows(trial.spec, tokenizer, draw, silent)
        for way, factors in corrections(trial, rows[: asked.fit_examples], asked.ways):
            trial.use(factors)
            cells = f"| {adapter.name} | {way} | {kept(_loss(full, held_rows))} |"
            if asked.scale_examples:
                fitted = rows[: asked.scale_examples]
                scale, _ = best_scale(lambda s, rows=fitted: _loss(full, rows, s))
                cells += f" {scale:.2f} | {kept(_loss(full, held_rows, scale))} |"
            else:
                cells += " | | |"
            print(cells, flush=True)


if __name__ == "__main__":
    main()
