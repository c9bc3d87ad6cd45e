"""Streaming against ``cp``: ``make bench``.

Generates a multi-shard checkpoint of 4.1 GB, then copies it with ``cp`` and prunes it with
``rand`` and with ``stru --importance l2``: in turn, three times over, each in its own process and
with the checkpoint dropped from the page cache beforehand.

What is compared: ``cp`` reads and writes all bytes, pruning at 0.65 reads all and writes fewer
(the table tells both); both end when the files are on the disk (fsync).
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from measure import (
    MIB,
    Measure,
    copy_command,
    folder_bytes,
    forget,
    generate,
    options,
    remove,
    repeat,
    run,
    shards,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 10, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
TIMES = 3


def main() -> None:
    options(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="loram-bench-") as name:
        root = Path(name)
        base, out = root / "base", root / "out"
        (root / "config.json").write_text(json.dumps(CONFIG))
        generate("checkpoint", root / "config.json", base, 10**9)
        idle = run([sys.executable, "-c", "import torch, loram_cli.stages.prune.stage"])
        largest = 2 * max(CONFIG["vocab_size"], 11008) * CONFIG["hidden_size"] * 2
        prune = [sys.executable, "-m", "loram_cli", "prune", "--model", str(base)]
        prune += ["--ratio", "0.65", "--out", str(out), "--run", str(root / "run")]
        commands = {
            "cp": copy_command(base, out),
            "prune rand": [*prune, "--strategy", "rand"],
            "prune stru l2": [*prune, "--strategy", "stru", "--importance", "l2"],
        }
        written = {}

        def job(label: str) -> Measure:
            forget(base)
            measure = run(commands[label])
            written[label] = folder_bytes(out)
            remove(out)
            return measure

        print(
            f"checkpoint: {folder_bytes(base) / 1e9:.2f} GB in "
            f"{len(shards(base))} shards; its two largest tensors: "
            f"{largest / MIB:.0f} MiB; a process that only imports torch: "
            f"{idle.peak_bytes / MIB:.0f} MiB",
            flush=True,
        )
        jobs = {label: partial(job, label) for label in commands}
        results = repeat(jobs, TIMES, partial(print, flush=True))
        print(f"medians of {TIMES}; memory is the highest of {TIMES}")
        print(
            f"{'command':<16}{'written':>10}{'seconds':>9}{'cpu s':>8}{'x cp':>7}{'peak':>11}{'above import':>14}"
        )
        for label, measure in results.items():
            print(
                f"{label:<16}{written[label] / 1e9:>7.2f} GB{measure.seconds:>9.1f}"
                f"{measure.cpu_seconds:>8.1f}"
                f"{measure.seconds / results['cp'].seconds:>7.2f}"
                f"{measure.peak_bytes / MIB:>7.0f} MiB"
                f"{max(0, measure.peak_bytes - idle.peak_bytes) / MIB:>10.0f} MiB"
            )


if __name__ == "__main__":
    main()
