"""A model that exceeds its memory, run layer by layer: beside itself whole, and accelerate's way.

python tests/benchmarks/offload.py [FOLDER]

A checkpoint of 1.6 GiB in bf16 scores eight texts in passes of four on the processor, in fp32, so
that its weights take 3.2 GiB; but for the whole one, 1 GiB is allowed for weights. accelerate is
given the same through ``device_map="auto"`` with ``max_memory`` and a folder. Each way has a
process of its own; memory is anonymous memory above the start, sampled every few milliseconds.
"""

import json
import tempfile
from pathlib import Path

from measure import GIB, MIB, folder_bytes, generate, options, told_by

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8000,
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
BUDGET_BYTES = GIB
PASSES = 2

CHILD = """
import contextlib, json, sys, tempfile, time
from pathlib import Path
import accelerate, torch, transformers
from measure import AnonymousPeak
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.offload import loaded_within, resident_layers
from loram_cli.reporting import NullReporter

way, model_dir, budget, passes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
ids = torch.randint(3, 8000, (8, 128), generator=torch.Generator().manual_seed(0))
seconds, last = [], []
with AnonymousPeak() as memory, contextlib.ExitStack() as stack, torch.inference_mode():
    begun = time.monotonic()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=model_dir.parent)))
    if way == "whole":
        model = load_causal_lm(model_dir, dtype=torch.float32, device="cpu")
    elif way == "loram":
        skeleton = SkeletonModel(model_dir, dtype=torch.float32, device="cpu")
        stack.enter_context(loaded_within(skeleton, resident_layers(skeleton, budget), NullReporter()))
        model = skeleton.model
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, device_map="auto", max_memory={"cpu": budget},
            offload_folder=folder,
        ).eval()
    loaded = time.monotonic() - begun
    for _ in range(passes):
        for batch in ids.split(4):
            begun = time.monotonic()
            logits = model(input_ids=batch).logits[:, -1]
            seconds.append(time.monotonic() - begun)
            last.append(logits.double().sum().item())
    on_disk = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
told = {"peak": memory.peak_bytes, "load": loaded, "pass": sorted(seconds)[len(seconds) // 2]}
print("\\n" + json.dumps(told | {"logits": last, "disk": on_disk}))
"""


def main() -> None:
    """Print the table; fail where what is computed differs, or more than the budget is held."""
    parser = options(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to work, instead of /tmp")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        config, model = Path(folder) / "config.json", Path(folder) / "model"
        config.write_text(json.dumps(CONFIG))
        generate("checkpoint", config, model, 800 * MIB)
        print(f"checkpoint: {folder_bytes(model) / GIB:.2f} GiB in bf16, run in fp32")
        told = {}
        for way in ("whole", "loram", "accelerate"):
            told[way] = mine = told_by(CHILD, way, model, BUDGET_BYTES, PASSES)
            print(
                f"{way:>10}: at most {mine['peak'] / GIB:.2f} GiB above the start, loaded in "
                f"{mine['load']:.1f} s, {mine['pass']:.2f} s a pass "
                f"({mine['pass'] / told['whole']['pass']:.2f} of the whole one's), "
                f"{mine['disk'] / GIB:.2f} GiB written"
            )
    ratio = told["loram"]["pass"] / told["accelerate"]["pass"]
    print(f"loram's pass takes {ratio:.2f} of accelerate's")
    if told["loram"]["logits"] != told["whole"]["logits"]:
        raise SystemExit("layer by layer something else was computed")
    if told["loram"]["peak"] > BUDGET_BYTES * 1.5:
        raise SystemExit("more was held than the budget and the passes' activations")


if __name__ == "__main__":
    main()
