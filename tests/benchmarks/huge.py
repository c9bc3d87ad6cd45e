"""Checkpoints larger than the memory: ``make bench-huge``.

Generates a checkpoint of LLaMA-2-70B's tensor shapes (fewer layers), larger than the memory that
its commands may have, and prunes (``rand``; ``stru --importance l2``), recovers and merges it,
each against ``cp`` of the base in the same run, with ``dd`` past the page cache beside it. The same bytes are compared: ``cp`` and ``merge``
write what they read; pruning reads the same and writes less; all end when the files are on the
disk (fsync), and all begin with the base dropped from the page cache.

The memory limit is RLIMIT_DATA (heap and private maps). It does not count the page cache, so the
table also tells how much of it the command's own files held at most, sampled once a second.
The bars: peak resident memory of at most the two largest tensors plus 1 GiB, time of at most 1.3
times ``cp``.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from measure import (
    GIB,
    Measure,
    copy_command,
    direct_copy_command,
    folder_bytes,
    forget,
    generate,
    remove,
    repeat,
    run,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
LARGEST_BYTES = 2 * 32000 * 8192 * 2  # embedding and lm_head, bfloat16
MOST_TIMES_CP = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune, recover and merge beyond a memory limit.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--limit-gib", type=float, default=4.0, help="RLIMIT_DATA of a command")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--folder", help="where to work; needs twice the checkpoint")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loram-bench-", dir=flags.folder) as name:
        bench(Path(name), flags.layers, int(flags.limit_gib * GIB), flags.times)


def bench(root: Path, layers: int, limit_bytes: int, times: int) -> None:
    base, out = root / "base", root / "out"
    pruned, adapter, recovered = root / "pruned", root / "adapter", root / "recovered"
    (root / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    generate("checkpoint", root / "config.json", base, 5 * 10**9)
    base_bytes = folder_bytes(base)
    if base_bytes <= limit_bytes:
        raise SystemExit("the checkpoint fits the limit: raise --layers or lower --limit-gib")
    loram = [sys.executable, "-m", "loram_cli"]
    keep = ["--keep-first", "1", "--keep-last", "1", "--ratio", "0.65"]
    prune = [*loram, "prune", "--model", str(base), *keep, "--run", str(root / "run")]
    recover = [*loram, "recover", "--model", str(base), "--run", str(root / "run")]
    recover += ["--in", str(adapter), "--out"]
    limited = partial(run, watched=[base, out], data_limit_bytes=limit_bytes)

    limited([*prune, "--strategy", "rand", "--out", str(pruned)])
    generate("adapter", pruned, adapter)
    remove(pruned)
    limited([*recover, str(recovered)])

    commands = {
        "cp": copy_command(base, out),
        "dd direct": direct_copy_command(base, out),
        "prune rand": [*prune, "--strategy", "rand", "--out", str(out)],
        "prune stru l2": [*prune, "--strategy", "stru", "--importance", "l2", "--out", str(out)],
        "recover": [*recover, str(out)],
        "merge": [*recover, str(recovered), "--merge", "--merge-out", str(out)],
    }
    written: dict[str, int] = {}
    idle = run([sys.executable, "-c", "import torch, loram_cli.stages.prune.stage"])
    bar_bytes = LARGEST_BYTES + GIB
    print(
        f"checkpoint: {base_bytes / 1e9:.1f} GB, {layers} layers of LLaMA-2-70B's shapes; "
        f"limit {limit_bytes / GIB:.1f} GiB (RLIMIT_DATA); bars: {bar_bytes / GIB:.2f} GiB "
        f"resident, {MOST_TIMES_CP} x cp; importing torch alone: {idle.peak_bytes / GIB:.2f} GiB",
        flush=True,
    )

    def job(label: str, measured: Callable[..., Measure]) -> Measure:
        forget(base)
        measure = measured(commands[label])
        written[label] = folder_bytes(out)
        remove(out)
        return measure

    jobs = {label: partial(job, label, limited) for label in commands}
    results = repeat(jobs, times, partial(print, flush=True))
    print(f"medians of {times}; memory is the highest of {times}")
    print(
        f"{'command':<14}{'written':>10}{'seconds':>9}{'cpu s':>8}{'x cp':>7}{'peak':>10}{'page cache':>12}"
    )
    missed = []
    for label, measure in results.items():
        ratio = measure.seconds / results["cp"].seconds
        cached = "-" if measure.cached_bytes is None else f"{measure.cached_bytes / GIB:.2f} GiB"
        print(
            f"{label:<14}{written[label] / 1e9:>7.2f} GB{measure.seconds:>9.1f}"
            f"{measure.cpu_seconds:>8.1f}{ratio:>7.2f}"
            f"{measure.peak_bytes / GIB:>6.2f} GiB{cached:>12}"
        )
        if ratio > MOST_TIMES_CP or measure.peak_bytes > bar_bytes:
            missed.append(label)
    print(f"bars missed: {', '.join(missed)}" if missed else "all bars met")


if __name__ == "__main__":
    main()
