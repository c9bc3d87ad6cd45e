"""Prove that loading in NF4 never holds the bf16 model: memory of the process while it loads.

python tests/benchmarks/quantized_load.py [FOLDER]

A checkpoint of 2.9 GiB in four shards is loaded in bf16 and in NF4, each in a process of its own.
Pages of the mapped shards are the kernel's to take back; what counts is anonymous memory, which a
thread samples every few milliseconds.
"""

import json
import tempfile
from pathlib import Path

from measure import GIB, MIB, folder_bytes, generate, options, told_by

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip

CHILD = """
import json, sys
from pathlib import Path
import torch, transformers, bitsandbytes
from measure import AnonymousPeak
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.skeleton import SkeletonModel, fill_whole
from loram_cli.reporting import NullReporter

model_dir, how = Path(sys.argv[1]), {"dtype": torch.bfloat16, "device": "cpu"}
with AnonymousPeak() as memory:
    if sys.argv[2] == "nf4":
        skeleton = SkeletonModel(model_dir, nf4=True, **how)
        fill_whole(skeleton, NullReporter())
        model = skeleton.model
    else:
        model = load_causal_lm(model_dir, **how)
held = sum(p.nbytes for p in model.parameters())
told = {"peak": memory.peak_bytes, "after": memory.above_start_bytes(), "packed": held}
print("\\n" + json.dumps(told))
"""


def main() -> None:
    """Print the table; fail where NF4 held as much as the bf16 model."""
    parser = options(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to work, instead of /tmp")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        config, model = Path(folder) / "config.json", Path(folder) / "model"
        config.write_text(json.dumps(CONFIG))
        generate("checkpoint", config, model, 800 * MIB)
        bf16_bytes = folder_bytes(model)
        print(f"checkpoint: {bf16_bytes / GIB:.2f} GiB in bf16")
        peaks = {}
        for kind in ("bf16", "nf4"):
            told = told_by(CHILD, model, kind)
            peaks[kind] = told["peak"]
            print(
                f"{kind:>5}: anonymous memory at most {told['peak'] / GIB:.2f} GiB above the start, "
                f"{told['after'] / GIB:.2f} GiB afterwards, parameters {told['packed'] / GIB:.2f} GiB"
            )
    if peaks["nf4"] > bf16_bytes / 2:
        raise SystemExit("loading in NF4 held more than half of the bf16 model")


if __name__ == "__main__":
    main()
