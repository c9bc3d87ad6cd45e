"""Generate inputs of the benches; run as a process of its own, so that its memory is its own.

python tests/benchmarks/generate.py checkpoint CONFIG.json DIRECTORY
python tests/benchmarks/generate.py adapter PRUNED DIRECTORY
"""

import json
import math
from pathlib import Path

import torch
from measure import options

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import CheckpointIndex, read_config
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.runs.manifest import Manifest

_BLOCK = 32 * 2**20
_RANK = 8


def checkpoint(config_file: str, target: str, max_shard_bytes: str) -> None:
    """Random weights of a config's shapes."""
    config, directory = json.loads(Path(config_file).read_text()), Path(target)
    directory.mkdir()
    shapes = family_for(config, "bench").tensor_shapes(config)
    plan = {name: TensorPlan(torch.bfloat16, shape) for name, shape in shapes.items()}
    torch.manual_seed(0)
    # One block of noise, cut out at a new place for every piece: drawing all of it takes minutes.
    noise = (torch.randn(2 * _BLOCK) * 0.02).bfloat16()
    with ShardedWriter(directory, plan, int(max_shard_bytes)) as writer:
        for name, tensor in plan.items():
            rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
            width = math.prod(tensor.shape) // rows
            most = max(1, _BLOCK // width)
            for done in range(0, rows, most):
                count = min(most, rows - done) * width
                start = int(torch.randint(0, _BLOCK, ()))
                piece = noise[start : start + count].clone()
                writer.write(name, piece.reshape(-1, *tensor.shape[1:]))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")


def adapter(source: str, target: str) -> None:
    """What ``train`` would write for a pruned model: random factors of every decoder linear."""
    pruned, directory = Path(source), Path(target)
    config = read_config(pruned)
    family = family_for(config, "bench")
    manifest = Manifest.read(pruned)
    torch.manual_seed(1)
    pairs = {}
    for name, entry in CheckpointIndex.open(pruned).tensors.items():
        module = name.removesuffix(".weight")
        if family.module_named(module) or module == family.lm_head:
            rows, columns = entry.shape
            factors = (torch.randn(_RANK, columns), torch.randn(rows, _RANK))
            pairs[module] = LoraPair(*(factor * 0.01 for factor in factors))
    settings = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 16, "bias": "none"}
    settings["target_modules"] = [*family.lora_targets, family.lm_head_target]
    directory.mkdir()
    LoraAdapter(settings, pairs).write(directory)
    Manifest(
        stage="train",
        key="bench",
        spec={},
        inputs={"source": {}},
        base=manifest.base,
        keep=manifest.keep,
    ).write(directory)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("kind", choices=("checkpoint", "adapter"))
    parser.add_argument("words", nargs="+", help="what the function of that name takes")
    asked = parser.parse_args()
    {"checkpoint": checkpoint, "adapter": adapter}[asked.kind](*asked.words)
