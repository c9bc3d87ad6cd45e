"""Streaming against ``cp``: ``make bench``.

Generates a multi-shard checkpoint of 4.4 GB, then copies it with ``cp``, prunes it with ``rand``
and with ``stru --importance l2``, each in its own process, and prints time, peak resident memory
and the ratio to ``cp`` in the same run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.units import MIB, format_bytes

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 10, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


def generate(directory: Path) -> int:
    directory.mkdir()
    shapes = family_for(CONFIG, "bench").tensor_shapes(CONFIG)
    plan = {name: TensorPlan(torch.bfloat16, shape) for name, shape in shapes.items()}
    torch.manual_seed(0)
    with ShardedWriter(directory, plan, max_shard_bytes=10**9) as writer:
        for name, tensor in plan.items():
            writer.write(name, torch.randn(tensor.shape, dtype=torch.bfloat16))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    return sum(tensor.num_bytes for tensor in plan.values())


def measure(words: list[str]) -> tuple[float, int]:
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words)}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="loram-bench-") as name:
        root = Path(name)
        total_bytes = generate(root / "base")
        index = CheckpointIndex.open(root / "base")
        largest = sorted((e.num_bytes for e in index.tensors.values()), reverse=True)[:2]
        print(
            f"checkpoint: {total_bytes:,} bytes, two largest tensors {format_bytes(sum(largest))}"
        )
        idle = measure([sys.executable, "-c", "import torch, loram_cli.stages.prune"])[1]
        print(f"a process that only imports torch: {format_bytes(idle)}")
        prune = [sys.executable, "-m", "loram_cli", "prune", "--model", str(root / "base")]
        prune += ["--ratio", "0.65", "--out", str(root / "out"), "--run", str(root / "run")]
        commands = {
            "cp": ["cp", "-r", str(root / "base"), str(root / "out")],
            "loram prune rand": [*prune, "--strategy", "rand"],
            "loram prune stru l2": [*prune, "--strategy", "stru", "--importance", "l2"],
        }
        print(f"{'command':<22}{'seconds':>9}{'x cp':>7}{'peak memory':>14}{'above import':>14}")
        reference = 0.0
        for label, words in commands.items():
            seconds, peak_bytes = measure(words)
            reference = reference or seconds
            above = max(0, peak_bytes - idle) / MIB
            print(
                f"{label:<22}{seconds:>9.1f}{seconds / reference:>7.2f}"
                f"{format_bytes(peak_bytes):>14}{above:>10.0f} MiB"
            )
            shutil.rmtree(root / "out")


if __name__ == "__main__":
    main()
