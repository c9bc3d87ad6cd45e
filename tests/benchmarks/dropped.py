"""What the dropped heads and channels do to an adapter that was trained without them.

Takes models and adapters that ``quality.py`` has left in its ``work`` folder, and brings what was
dropped back by degrees: at share 0 the base computes what the small model does, at 1 it is whole.
Held-out loss at each share, with no adapter and with the recovered one.

    python tests/benchmarks/dropped.py bench-quality/work --base DIR --eval-data test.jsonl \\
        --max-length 256
"""

import argparse
from pathlib import Path

import torch
from measure import options
from quality import Cell, answer_loss, parse_methods

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Geometry
from loram_cli.checkpoint.index import read_config
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.pruning.groups import LayerKeep
from loram_cli.runs.manifest import Manifest
from loram_cli.training.adapters import load_adapter
from loram_cli.training.data.documents import load_instructions

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def part_back(base: Path, small: Path, share: float) -> torch.nn.Module:
    """The base with only a share of what was dropped.

    Of the modules that read heads or channels: the base's weights by ``share``, the small model's
    (zero where it has none) by the rest. Their other weights are the same, as long as the small
    model is not aligned or by ``reconstruct`` alone.

    Args:
        base: Full model.
        small: Pruned or aligned model.
        share: From 0 to 1.
    """
    model, narrow = (load_causal_lm(path, dtype=torch.float32) for path in (base, small))
    config = read_config(base)
    family, geometry = family_for(config, str(base)), Geometry.from_config(config)
    for i, record in Manifest.read(small).keep.items():
        for module in family.modules:
            columns = LayerKeep.from_mapping(record).columns(module, geometry.layers[int(i)])
            if columns is None:
                continue
            name = f"{family.layer_prefix(int(i))}{module.name}.weight"
            mine = torch.zeros_like(model.get_parameter(name))
            mine[:, columns] = narrow.get_parameter(name)
            model.get_parameter(name).lerp_(mine, 1 - share)
    return model


def main() -> None:
    options = _options()
    tokenizer = load_tokenizer(options.base)
    examples = load_instructions(options.eval_data, tokenizer=tokenizer)[: options.eval_examples]
    print("| aligned by | seed | " + " | ".join(f"{share:g}" for share in _SHARES) + " |")
    for method in options.methods:
        for seed in options.seeds:
            cell = Cell(seed, options.strategy, options.ratio, method)
            small = options.work / cell.source
            recovered = options.work / f"recovered-{cell.name}"
            losses = []
            for share in _SHARES:
                model = part_back(options.base, small, share)
                before = answer_loss(model, tokenizer, examples, options.max_length)
                model = load_adapter(model, recovered)
                after = answer_loss(model, tokenizer, examples, options.max_length)
                losses.append(f"{before:.2f} -> {after:.2f}")
            print(
                f"| {'+'.join(method) or 'nothing'} | {seed} | {' | '.join(losses)} |", flush=True
            )


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    add = parser.add_argument
    add("work", type=Path, help="the work folder of quality.py's --out")
    add("--base", type=Path, required=True)
    add("--eval-data", required=True)
    add("--eval-examples", type=int, default=64)
    add("--max-length", type=int, default=192)
    add("--strategy", default="stru")
    add("--ratio", type=float, default=0.65)
    add("--methods", type=parse_methods, default="none,reconstruct")
    add("--seeds", type=int, nargs="+", default=[1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
