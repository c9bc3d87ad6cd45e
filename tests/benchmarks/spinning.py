"""What OpenMP's waiting threads cost training on a CPU: alone, and beside a busy process.

GNU's OpenMP lets a thread that waits spin for a while before it sleeps. Beside another busy
process that time is lost to both. For each setting a process of its own trains LoRA on random
weights of the demo base's size and of SmolLM2-135M's, first alone and then beside two threads
that never rest. Time per step is the least of all for the first, since other load only adds to
it, and the mean for the second. ``--rounds`` repeats all of it, settings in turn.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from measure import options

# Hidden size, layers, heads, key/value heads, MLP width, vocabulary; rows, their length.
SIZES = {
    "demo": (128, 12, 8, 4, 320, 512, 4, 128),
    "smollm2": (576, 30, 9, 3, 1536, 49152, 1, 64),
}
SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (300, 1000, 3000, 10000)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
LEAST_STEPS = 4


def train(size: str, seconds: float) -> None:
    """Print the seconds of each step, as JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, pairs, mlp, vocabulary, rows, length = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=pairs, intermediate_size=mlp, vocab_size=vocabulary,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.05)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(2, vocabulary, (rows, length))
    times: list[float] = []
    end = time.monotonic() + seconds
    # The first step allocates.
    while len(times) <= LEAST_STEPS or time.monotonic() < end:
        began = time.monotonic()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic() - began)
    print(json.dumps(times[1:]))


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """Processor time taken by another process while the block runs."""
    code = f"import threading, hashlib\nb = bytes(2**20)\ndef run():\n while 1: hashlib.sha256(b)\n[threading.Thread(target=run).start() for _ in range({threads})]"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def steps(size: str, setting: dict[str, str], seconds: float) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if k not in OURS} | setting
    command = [sys.executable, __file__, "--train", size, "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--train", choices=SIZES)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="by commas")
    asked = parser.parse_args()
    if asked.train:
        train(asked.train, asked.seconds)
        return
    for size in SIZES:
        alone: dict[str, list[float]] = {}
        beside: dict[str, list[float]] = {}
        for _ in range(asked.rounds):
            for name in asked.settings.split(","):
                alone.setdefault(name, []).extend(steps(size, SETTINGS[name], asked.seconds))
                with busy(2):
                    beside.setdefault(name, []).extend(steps(size, SETTINGS[name], asked.seconds))
        print(f"{size}: seconds a step, alone and beside a busy process of two threads")
        best = min(alone["as it comes"])
        for name, times in alone.items():
            mean = sum(beside[name]) / len(beside[name])
            print(
                f"  {name:<12} {min(times):8.3f} ({min(times) / best:4.2f} of as it comes) "
                f"{mean:8.3f} ({mean / min(times):5.1f} times alone)",
                flush=True,
            )


if __name__ == "__main__":
    main()
