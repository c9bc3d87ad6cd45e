"""What OpenMP's waiting threads cost training on a CPU: alone, and beside a busy process.

GNU's OpenMP lets a thread that waits spin for a while before it sleeps; beside another busy
process that time is lost to both. For each setting a process of its own trains LoRA on random
weights of the demo base's size and of SmolLM2-135M's, alone and beside two threads that never
rest. Alone, the least time of a step counts, since whatever else runs only adds to it; beside the
busy process the mean. ``--rounds`` repeats all of it, the settings in turn.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from measure import options

# Hidden size, layers, heads, key/value heads, MLP width, vocabulary; rows, their length.
SIZES = {
    "demo": (128, 12, 8, 4, 320, 512, 4, 128),
    "smollm2": (576, 30, 9, 3, 1536, 49152, 1, 64),
}
AS_IT_COMES = "as it comes"
SETTINGS: dict[str, dict[str, str]] = {
    AS_IT_COMES: {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{
        f"spin {count}": {"GOMP_SPINCOUNT": str(count)}
        for count in (1000, 3000, 10000, 30000, 100000)
    },
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
LEAST_STEPS = 3
_BUSY = """
import hashlib, threading
block = bytes(2**20)
def run():
    while True:
        hashlib.sha256(block)
for _ in range(2):
    threading.Thread(target=run).start()
"""


def trainer(size: str) -> Callable[[], None]:
    """A function that does one step of training."""
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

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_seconds(step: Callable[[], None], seconds: float) -> list[float]:
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < LEAST_STEPS or time.monotonic() < end:
        began = time.monotonic()
        step()
        times.append(time.monotonic() - began)
    return times


@contextmanager
def busy() -> Iterator[None]:
    """Another process keeps two threads busy while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def measured(sizes: list[str], seconds: float) -> dict[str, list[list[float]]]:
    """Per size the seconds of each step, alone and beside the busy process."""
    found = {}
    for size in sizes:
        step = trainer(size)
        step()  # allocates
        alone = step_seconds(step, seconds)
        with busy():
            found[size] = [alone, step_seconds(step, seconds)]
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--sizes", default=",".join(SIZES), help="by commas")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="by commas")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measured(asked.sizes.split(","), asked.seconds)))
        return
    plain = {key: value for key, value in os.environ.items() if key not in OURS}
    command = [sys.executable, __file__, "--child", "--seconds", str(asked.seconds)]
    command += ["--sizes", asked.sizes]
    best: dict[str, float] = {}
    for turn in range(asked.rounds):
        for name in asked.settings.split(","):
            done = subprocess.run(
                command, env=plain | SETTINGS[name], stdout=subprocess.PIPE, text=True, check=True
            )
            for size, (alone, beside) in json.loads(done.stdout).items():
                least, mean = min(alone), sum(beside) / len(beside)
                if name == AS_IT_COMES:
                    best[size] = min(least, best.get(size, least))
                print(
                    f"{turn + 1} {size:<8} {name:<12} alone {least:7.3f} s "
                    f"({least / best.get(size, least):5.2f} of as it comes), beside {mean:8.3f} s "
                    f"({mean / least:6.1f} times alone; {len(alone)} and {len(beside)} steps)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
