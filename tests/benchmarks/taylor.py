"""Taylor importance streamed against the whole-model way, over growing depth: ``make bench``.

Every measurement is a process of its own. Peak memory is the process's highest resident memory
less that of one that only imports the libraries, and time is CPU time, which other users of the
machine do not stretch; the scores of both ways are compared (median relative difference).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import environment_with, options

DEPTHS = (4, 8, 16, 32)
SAMPLES, LENGTH = 6, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768,
    "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4,
    "vocab_size": 8192, "tie_word_embeddings": False, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip


def generate(directory: Path, depth: int) -> int:
    import torch

    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan

    directory.mkdir()
    config = {**CONFIG, "num_hidden_layers": depth}
    shapes = family_for(config, "bench").tensor_shapes(config)
    plan = {name: TensorPlan(torch.bfloat16, shape) for name, shape in shapes.items()}
    torch.manual_seed(0)
    with ShardedWriter(directory, plan) as writer:
        for name, tensor in plan.items():
            values = torch.randn(tensor.shape, dtype=torch.bfloat16)
            writer.write(name, values * 0.02 if len(tensor.shape) > 1 else values * 0.1 + 1)
    (directory / "config.json").write_text(json.dumps(config))
    return sum(tensor.num_bytes for tensor in plan.values())


def score(way: str, base: Path, out: Path) -> None:
    """In a child process: score every group of every layer, one way or the other."""
    import torch

    from loram_cli.arch.registry import family_for
    from loram_cli.arch.spec import Geometry
    from loram_cli.checkpoint.index import read_config
    from loram_cli.modeling.layerwise.gradients import layer_gradients
    from loram_cli.modeling.layerwise.states import BoundaryPool
    from loram_cli.modeling.layerwise.stream import LayerStream
    from loram_cli.pruning.scores import layer_scores, taylor_salience
    from loram_cli.reporting import NullReporter

    if way == "import":
        import transformers.models.llama.modeling_llama  # noqa: F401

        return
    config = read_config(base)
    family, geometry = family_for(config, "bench"), Geometry.from_config(config)
    layers = range(len(geometry.layers))
    windows = torch.randint(
        0, config["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    scores = {}
    if way == "whole":
        from helpers.whole_model_gradients import whole_model_gradients

        names = list(family.linear_names(config))
        gradients = whole_model_gradients(base, windows, names)
        for i in layers:
            scores[i] = layer_scores(
                family,
                geometry.layers[i],
                lambda m, i=i: taylor_salience(
                    *gradients[f"{family.layer_prefix(i)}{m.name}.weight"]
                ),
            )
    else:
        names = [module.name for module in family.modules]
        with LayerStream(base, "cpu") as stream:
            shape = (SAMPLES, LENGTH, config["hidden_size"])
            with BoundaryPool(shape, stream.dtype, 4 * 2**20, out.with_suffix(".act")) as pool:
                for i, found in layer_gradients(
                    stream, windows, layers, names, pool, NullReporter()
                ):
                    scores[i] = layer_scores(
                        family, geometry.layers[i], lambda m, f=found: taylor_salience(*f[m.name])
                    )
    flat = torch.cat([scores[i][kind] for i in layers for kind in sorted(scores[i])])
    torch.save(flat, out)


def measure(way: str, base: Path, out: Path) -> tuple[float, float]:
    """Peak resident MiB and CPU seconds of a child process."""
    # One thread each: more of them, on a machine that others use, measure the waiting.
    # The whole-model way is the one that tests compare with: tests/helpers.
    environment = {**environment_with(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--child", way, base, out]
    process = subprocess.Popen(words, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {way}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    import torch

    with tempfile.TemporaryDirectory(prefix="loram-bench-") as name:
        root = Path(name)
        idle_mib, idle_seconds = measure("import", root, root)
        print(
            f"hidden 768, intermediate 2048, bf16, {SAMPLES} windows of {LENGTH} tokens, one thread"
        )
        print(
            f"4 MiB of activations in memory, the rest on disk; less an import ({idle_mib:.0f} MiB)"
        )
        print(
            "layers    weights |  whole model      CPU |   streamed      CPU      x |  scores differ by"
        )
        for depth in DEPTHS:
            base = root / f"base-{depth}"
            weight_mib = generate(base, depth) / 2**20
            memory, seconds, scores = {}, {}, {}
            for way in ("whole", "streamed"):
                out = root / f"{way}-{depth}.pt"
                peak_mib, cpu_seconds = measure(way, base, out)
                memory[way], seconds[way] = peak_mib - idle_mib, cpu_seconds - idle_seconds
                scores[way] = torch.load(out)
            difference = ((scores["streamed"] - scores["whole"]).abs() / scores["whole"]).median()
            print(
                f"{depth:>6}{weight_mib:>7.0f} MiB |"
                f"{memory['whole']:>9.0f} MiB{seconds['whole']:>7.1f} s |"
                f"{memory['streamed']:>7.0f} MiB{seconds['streamed']:>7.1f} s"
                f"{seconds['streamed'] / seconds['whole']:>7.2f} |  {difference:.1e}",
                flush=True,
            )
            for file in base.iterdir():
                file.unlink()


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--child", nargs=3, metavar=("WAY", "BASE", "OUT"), help="one measurement")
    asked = parser.parse_args()
    if asked.child:
        score(asked.child[0], *map(Path, asked.child[1:]))
    else:
        main()
