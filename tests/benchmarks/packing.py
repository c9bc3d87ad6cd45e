"""Real tokens a second of LoRA training with packing off, auto and on, beside TRL's SFTTrainer.

python tests/benchmarks/packing.py [--lengths FILE] [--micro-batch 8] [--width 384 --layers 6]

A random Llama (13M parameters unless told) learns rows whose lengths are spread as GSM8K's with SmolLM2's
tokenizer are (or as a JSON list of lengths says), on the processor in fp32, batches of 16. TRL packs
into rows of 512 tokens ("bfd", which it flattens into one row a pass) and gets as many packs a pass
as hold a micro-batch of ours, so that a pass has about as many tokens; its unpacked way is measured
too. Each way has a process of its own. The first step is not measured. Tokens are those of the
examples alone, without padding; seconds of the processor say more than the clock on a machine that
is shared, and the ratios at the end are by them. Losses of our three ways must agree to rounding, and ``auto`` must compute at most 1.05
tokens for each real one.
"""

import json
import random
from pathlib import Path

from measure import options, told_by

WAYS = ("off", "auto", "on", "trl", "trl-packed")
MOST_PADDING = 1.05

CHILD = """
import json, logging, math, sys, tempfile, time, warnings
from contextlib import contextmanager
from pathlib import Path
import numpy as np, torch, transformers
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
from loram_cli.arch.registry import family_for
from loram_cli.modeling.random_model import random_causal_lm
from loram_cli.training.adapters import attach_lora, lora_config

way, lengths = sys.argv[1], json.loads(sys.argv[2])
micro, steps, width, layers = map(int, sys.argv[3:7])
config = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": width,
    "intermediate_size": width * 8 // 3, "num_hidden_layers": layers, "head_dim": 64,
    "num_attention_heads": width // 64, "num_key_value_heads": 1 if width % 128 else 2,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
family = family_for(config, "bench")
model = random_causal_lm(
    family, config, dtype=torch.float32, device="cpu", attention="sdpa", nf4=False, seed=0
)
model = attach_lora(model, lora_config(family.lora_targets, dropout=0.0), seed=0).train()
rng = np.random.default_rng(0)
rows = [rng.integers(3, 8000, length, dtype=np.int32) for length in lengths]
times, clocks = [], []
def tick():
    times.append(time.monotonic()); clocks.append(time.process_time())

if way.startswith("trl"):
    import datasets
    from trl import SFTConfig, SFTTrainer
    packed = way.endswith("packed")
    class Tick(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs): tick()
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs: losses.append(logs["loss"])
    losses = []
    from tokenizers import Tokenizer as Fast, models
    words = {f"t{i}": i for i in range(8000)}
    fast = Fast(models.WordLevel(words, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t0"
    )
    mine = max(1, round(micro * sum(lengths) / len(lengths) / 512)) if packed else micro
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model, processing_class=tokenizer, callbacks=[Tick()],
            train_dataset=datasets.Dataset.from_dict({"input_ids": [r.tolist() for r in rows]}),
            args=SFTConfig(
                output_dir=folder, max_length=512, packing=packed, num_train_epochs=1,
                per_device_train_batch_size=mine, gradient_accumulation_steps=16 // micro,
                learning_rate=1e-4, lr_scheduler_type="constant", use_cpu=True, bf16=False,
                gradient_checkpointing=False, logging_steps=1, report_to="none",
                save_strategy="no", disable_tqdm=True,
            ),
        )
        trainer.train()
    share = (len(times) - 1) / max(1, len(times))
    real = sum(lengths) * share
    computed = None
else:
    from loram_cli.training.data.tokens import TokenRow
    from loram_cli.training.loop.loop import fit_lora
    from loram_cli.training.loop.options import FitOptions
    class Clock:
        def note(self, line): pass
        def warn(self, line): pass
        @contextmanager
        def progress(self, *args): yield self
        def advance(self, steps=1): tick()
        def skip(self, steps): pass
        def detail(self, text): pass
    with tempfile.TemporaryDirectory() as folder:
        result = fit_lora(model, [TokenRow(r) for r in rows], [], FitOptions(
            learning_rate=1e-4, lr_scheduler="constant", warmup_steps=0, steps=steps, batch=16,
            micro_batch=micro, checkpoint_steps=10**6, packing=way, seed=0,
        ), Path(folder), Clock())
    real = result.tokens * (steps - 1) / steps
    computed = result.computed_tokens / result.tokens
    losses = [row.loss for row in result.history]
print("\\n" + json.dumps({
    "wall": real / (times[-1] - times[0]), "cpu": real / (clocks[-1] - clocks[0]),
    "computed": computed, "losses": losses,
}))
"""


def main() -> None:
    """Print the table; fail where losses differ or padding exceeds the bar."""
    parser = options(__doc__)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=384, help="Hidden size, a multiple of 64.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ways", default=",".join(WAYS))
    asked = parser.parse_args()
    draw = random.Random(0)
    lengths = [min(512, int(draw.lognormvariate(5.19, 0.36))) for _ in range(16 * asked.steps)]
    if asked.lengths:
        lengths = draw.sample(json.loads(asked.lengths.read_text()), 16 * asked.steps)
    told = {}
    for way in asked.ways.split(","):
        size = (asked.micro_batch, asked.steps, asked.width, asked.layers)
        told[way] = told_by(CHILD, way, json.dumps(lengths), *size)
        mine = told[way]
        computed = mine["computed"]
        padding = f", {computed:.3f} computed for each" if computed else ""
        print(
            f"{way:>12}: {mine['wall']:7.0f} real tokens/s, {mine['cpu']:7.0f} a second of "
            f"the processor{padding}",
            flush=True,
        )
    for other in told.keys() - {"auto"} if "auto" in told else ():
        ratio = told["auto"]["cpu"] / told[other]["cpu"]
        print(f"auto trains {ratio:.2f} times as many real tokens a second as {other}")
    for way in {"auto", "on"} & set(told) if "off" in told else ():
        pairs = zip(told[way]["losses"], told["off"]["losses"], strict=True)
        gap = max(abs(a - b) for a, b in pairs)
        if gap > 1e-3:
            raise SystemExit(f"{way}: the loss is {gap} away from the unpacked one")
    if "auto" in told and told["auto"]["computed"] > MOST_PADDING:
        raise SystemExit(f"auto: {told['auto']['computed']:.3f} tokens computed for each real one")


if __name__ == "__main__":
    main()
