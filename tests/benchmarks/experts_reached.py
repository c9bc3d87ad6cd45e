"""Layers with experts that are read as they run: whole, and only the experts that tokens reach.

python tests/benchmarks/experts_reached.py [FOLDER] [--base MIXTURE]

A random mixture of Qwen3's shape (128 experts, of which a token has 8; 1.5 GiB in bf16) continues
prompts of 32 tokens on the processor, in fp32, with 1.75 GiB for weights. Every way and number of
texts has a process of its own; the second time, the page cache is emptied before each token, so that
weights come from the disk. Times are processor time, then the clock's. ``--base`` takes a trained mixture, such as ``make bench-experts`` leaves
in ``bench-experts/base``, and prints the share of its experts that word problems reach.
"""

import json
import tempfile
from pathlib import Path

from measure import GIB, MIB, folder_bytes, generate, options, told_by

CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 8000,
    "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 384,
    "num_hidden_layers": 5, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "dtype": "bfloat16",
}  # fmt: skip
BUDGET_BYTES = 1792 * MIB
TOKENS = 5
TEXTS = (1, 8)

CHILD = """
import json, sys, time
from pathlib import Path
import torch
from measure import AnonymousPeak, forget
from loram_cli.modeling import offload
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import NullReporter

way, model_dir, budget, texts, tokens, cold = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
if way == "whole":
    offload.reaches_most = lambda *_: True
elif way == "reached":
    offload.reaches_most = lambda *_: False
torch.set_num_threads(1)
ids = torch.randint(3, 8000, (texts, 32), generator=torch.Generator().manual_seed(0))
skeleton = SkeletonModel(model_dir, dtype=torch.float32, device="cpu")
layers = len(list(skeleton.layers()))
stay = offload.resident_layers(skeleton, budget)
seconds, processor, brought, last = [], [], [], []
with (
    AnonymousPeak() as memory,
    offload.loaded_within(skeleton, stay, NullReporter()) as source,
    torch.inference_mode(),
):
    cache = None
    for step in range(tokens + 1):
        if cold:
            forget(model_dir)
        before, begun, worked = source.loaded_bytes, time.monotonic(), time.process_time()
        out = skeleton.model(input_ids=ids, past_key_values=cache, use_cache=True)
        seconds.append(time.monotonic() - begun)
        processor.append(time.process_time() - worked)
        brought.append(source.loaded_bytes - before)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        last.append(out.logits[:, -1].double().sum().item())
told = {"token": sorted(seconds[1:])[tokens // 2], "logits": last}
told |= {"processor": sorted(processor[1:])[tokens // 2], "passing": layers - stay}
# The first one after the prompt may find a layer that was read for the prompt's next pass.
told |= {"bytes": sum(brought[2:]) / (tokens - 1), "peak": memory.peak_bytes}
print("\\n" + json.dumps(told))
"""

SHARES = """
import json, sys
from pathlib import Path
import torch
from loram_cli.arch.experts import reached_share
from loram_cli.demo.problems import corpus
from loram_cli.modeling.load import load_causal_lm, load_tokenizer

base = Path(sys.argv[1])
model, tokenizer = load_causal_lm(base, dtype=torch.float32, device="cpu"), load_tokenizer(base)
ids = torch.cat([torch.tensor(tokenizer(text).input_ids) for text in corpus(400, seed=5)])
shares = []
for layer in model.get_submodule(model.family.layers):
    experts = layer.get_submodule(model.family.experts.module)
    count = experts.get_parameter("down_proj").shape[0]
    experts.register_forward_pre_hook(
        lambda _, args, count=count: shares.append(len(args[1].unique()) / count)
    )

def share():
    mean = sum(shares) / len(shares)
    shares.clear()
    return mean

told = {}
for texts in (1, 2, 4, 8, 16):
    with torch.inference_mode():
        out = model(input_ids=ids[: texts * 200].view(texts, 200), use_cache=True)
        told[f"{texts} x 200 of prompts"] = share()
        for _ in range(64):
            given = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=given, past_key_values=out.past_key_values, use_cache=True)
        told[f"a token of {texts}"] = share()
for tokens in (8, 32, 512, 2048):
    with torch.inference_mode():
        model(input_ids=ids[:tokens][None])
    told[f"{tokens} tokens of one text"] = share()
print("\\n" + json.dumps(told))
"""


def main() -> None:
    """Print the tables; fail where what is computed differs, or more than the budget is held."""
    parser = options(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to work, instead of /tmp")
    parser.add_argument("--base", type=Path, help="a trained mixture")
    parser.add_argument("--texts", type=int, nargs="+", default=TEXTS, help="at a time")
    asked = parser.parse_args()
    if asked.base is not None:
        for what, share in told_by(SHARES, asked.base).items():
            print(f"{what:>24}: {share:.2f} of a layer's experts are reached")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        config, model = Path(folder) / "config.json", Path(folder) / "model"
        config.write_text(json.dumps(CONFIG))
        generate("checkpoint", config, model, 800 * MIB)
        print(f"checkpoint: {folder_bytes(model) / GIB:.2f} GiB in bf16, run in fp32")
        for cold in (0, 1):
            print("from the disk:" if cold else "from the page cache:")
            for texts in asked.texts:
                _compare(model, texts, cold)


def _compare(model: Path, texts: int, cold: int) -> None:
    told = {
        way: told_by(CHILD, way, model, BUDGET_BYTES, texts, TOKENS, cold)
        for way in ("whole", "reached")
    }
    whole, reached = told["whole"], told["reached"]
    print(
        f"  {texts} texts, {whole['passing']} layers: {whole['bytes'] / MIB:.0f} and "
        f"{reached['bytes'] / MIB:.0f} MiB a token (x {whole['bytes'] / reached['bytes']:.1f}); "
        f"{whole['processor']:.2f} and {reached['processor']:.2f} s of a processor "
        f"(x {whole['processor'] / reached['processor']:.1f}); "
        f"{whole['token']:.2f} and {reached['token']:.2f} s "
        f"(x {whole['token'] / reached['token']:.1f}); "
        f"peak {whole['peak'] / GIB:.2f} and {reached['peak'] / GIB:.2f} GiB",
        flush=True,
    )
    if whole["logits"] != reached["logits"]:
        raise SystemExit("with only the experts that are reached something else was computed")
    if max(way["peak"] for way in told.values()) > BUDGET_BYTES * 1.5:
        raise SystemExit("more was held than the budget and the passes' activations")


if __name__ == "__main__":
    main()
