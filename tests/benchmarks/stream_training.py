"""LoRA on a model that exceeds its memory: ours layer by layer, accelerate's offloading, resident.

python tests/benchmarks/stream_training.py [FOLDER] [--batches 1,8,32]

A checkpoint of 0.5 GiB in bf16 is trained on the processor in fp32, where its weights take 1
GiB: one optimizer step (forward, backward, AdamW) on batches of 32 tokens a row in micro-batches
of at most four rows, after one step that is not measured where a row is all. Resident goes with
and without gradient checkpointing. accelerate gets ``device_map="auto"`` with ``max_memory`` of a
quarter of the weights, a folder, and PEFT with gradient checkpointing: without it each weight
would stay from its forward to its backward pass. PEFT leaves the factors of offloaded layers
without storage, and training fails; here they are given some. Each way has a process of its own;
memory is anonymous memory above the start, sampled fifty times a second, and ours runs under a
limit (RLIMIT_DATA). ``ours, file`` keeps hidden states in a file. Seconds
of the processor are those of all threads, and say more than the clock on a machine that is shared.

Losses of all ways must be the same, to the bit but for accelerate's. The bars are: at the largest
batch at most 1.15 of the time of the resident model with gradient checkpointing, which any model
needs that does not fit; peak at most a quarter of plain resident's. Beside plain resident, which
keeps what a layer computes, there is a floor, and no bar: frozen weights take one product forward
and one backward, layer by layer one more but for the MLP's last (``lora_pass``).
"""

import json
import subprocess
import tempfile
from pathlib import Path

from measure import GIB, MIB, folder_bytes, generate, options, told_by

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8000,
    "hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 40,
    "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
WAYS = ("resident", "resident, checkpointing", "ours", "ours, file", "accelerate")
MICRO_BATCH, LENGTH = 4, 32
LIMIT_BYTES = GIB // 2
MOST_TIME, MOST_MEMORY = 1.15, 0.25
_WIDE = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
_NARROW = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
# Products of a layer by what they multiply, and the share that the second pass leaves out.
_PRODUCTS = 2 * _WIDE + 2 * _NARROW + 3 * CONFIG["intermediate_size"]
FLOOR = (3 - CONFIG["intermediate_size"] / _PRODUCTS) / 2

CHILD = """
import contextlib, json, resource, sys, tempfile, time, warnings
from pathlib import Path
import accelerate, bitsandbytes, peft, torch, transformers
from measure import AnonymousPeak, anonymous_bytes
from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.modeling.chunked_loss import chunked_loss
from loram_cli.modeling.layerwise.lora_pass import streamed_lora
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import attach_lora, lora_config

way, folder, batch, micro, length, limit = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
family = family_for(read_config(folder), "bench")
targets = [*family.lora_targets, family.lm_head_target]
how = {"dtype": torch.float32, "device": "cpu"}
ids = torch.randint(3, 8000, (batch, length), generator=torch.Generator().manual_seed(0))
batches = [{"input_ids": some, "labels": some} for some in ids.split(micro)]
items = batch * (length - 1)

def factors(model):
    model = attach_lora(model, lora_config(targets, dropout=0.0), seed=0).train()
    model.config.use_cache = False
    for module in model.modules():
        for name, factor in module.named_parameters(recurse=False):
            if factor.requires_grad and factor.is_meta:
                # B must be zero, and A must not: which is which is told by the rank.
                real = torch.zeros(factor.shape)
                if factor.shape[0] == 8:
                    real.normal_(std=0.01)
                module._parameters[name] = torch.nn.Parameter(real)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

def plain(model, optimizer, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    def step():
        losses = []
        with chunked_loss(model):
            for some in batches:
                loss = model(**some, num_items_in_batch=items).loss
                loss.backward()
                losses.append(float(loss))
        optimizer.step(), optimizer.zero_grad()
        return losses
    return step

with AnonymousPeak(0.02) as memory, contextlib.ExitStack() as stack:
    if way.startswith("ours"):
        most = anonymous_bytes() + 512 * 2**20 + limit  # threads' stacks and maps count as well
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    begun = time.monotonic()
    if way.startswith("ours"):
        skeleton = SkeletonModel(folder, **how)
        model, optimizer = factors(skeleton.model)
        there = folder.parent / "states" if way.endswith("file") else "device"
        passes = stack.enter_context(
            streamed_lora(skeleton, model, NullReporter(), activations=there)
        )
        def step():
            losses = [float(loss) for loss in passes.accumulate(batches, items)]
            optimizer.step(), optimizer.zero_grad()
            return losses
    elif way == "accelerate":
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="auto", max_memory={"cpu": "260MiB"},
            offload_folder=place, local_files_only=True,
        )
        model.family = family
        step = plain(*factors(model), True)
    else:
        step = plain(*factors(load_causal_lm(folder, **how)), way.endswith("checkpointing"))
    loaded = time.monotonic() - begun
    first = step() if batch == 1 else None
    begun, worked = time.monotonic(), time.process_time()
    losses = step()
    seconds, worked = time.monotonic() - begun, time.process_time() - worked
told = {"peak": memory.peak_bytes, "load": loaded, "step": seconds, "cpu": worked}
told["loss"], told["first"] = losses, first or losses
print("\\n" + json.dumps(told))
"""


def main() -> None:
    """Print the table; fail where losses differ or a bar is missed."""
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--batches", default="1,8,32")
    asked = parser.parse_args()
    batches = [int(word) for word in asked.batches.split(",")]
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        config, model = Path(folder) / "config.json", Path(folder) / "model"
        config.write_text(json.dumps(CONFIG))
        generate("checkpoint", config, model, 800 * MIB)
        print(f"checkpoint: {folder_bytes(model) / GIB:.2f} GiB in bf16, trained in fp32")
        for batch in batches:
            told = _measure(model, batch)
    for way, ratio in _ratios(told, "step", WAYS[0]).items():
        print(f"{way}: step {ratio:.2f} of {WAYS[0]} (floor of the products {FLOOR:.2f})")
    missed = _missed(told, "step", WAYS[1], MOST_TIME)
    missed += _missed(told, "peak", WAYS[0], MOST_MEMORY)
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


def _missed(told: dict[str, dict], figure: str, beside: str, most: float) -> list[str]:
    """Print our ratios, and give those above a bar."""
    ratios = _ratios(told, figure, beside)
    lines = [f"{way}: {figure} {ratio:.2f} of {beside}" for way, ratio in ratios.items()]
    print("\n".join(f"{line} (bar {most})" for line in lines))
    return [line for line, ratio in zip(lines, ratios.values(), strict=True) if ratio > most]


def _ratios(told: dict[str, dict], figure: str, beside: str) -> dict[str, float]:
    return {way: told[way][figure] / told[beside][figure] for way in ("ours", "ours, file")}


def _measure(model: Path, batch: int) -> dict[str, dict]:
    print(f"batch {batch}:")
    told: dict[str, dict] = {}
    for way in WAYS:
        micro = min(batch, MICRO_BATCH)
        try:
            mine = told_by(CHILD, way, model, batch, micro, LENGTH, LIMIT_BYTES)
        except subprocess.CalledProcessError as error:
            if way != "accelerate":
                raise
            print(f"{way:>24}: failed: {error.stderr.strip().splitlines()[-1][:120]}")
            continue
        told[way] = mine
        base = told["resident"]
        print(
            f"{way:>24}: {mine['step']:7.2f} s a step ({mine['step'] / base['step']:.2f}), "
            f"{mine['cpu']:.2f} s of the processor ({mine['cpu'] / base['cpu']:.2f}), "
            f"{batch * LENGTH / mine['step']:6.1f} tokens/s, at most {mine['peak'] / GIB:.2f} GiB "
            f"({mine['peak'] / base['peak']:.2f})",
            flush=True,
        )
        # accelerate's factors are drawn otherwise, which shows once they have learnt.
        loss = "first" if way == "accelerate" else "loss"
        gap = max(abs(a - b) for a, b in zip(mine[loss], base[loss], strict=True))
        if gap > (1e-5 if way == "accelerate" else 0):
            raise SystemExit(f"{way}: the loss is {gap} away from the resident model's")
    return told


if __name__ == "__main__":
    main()
