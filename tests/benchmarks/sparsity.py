"""Perplexity of SparseGPT against magnitude at the same sparsity: ``make bench``.

Prunes the demo base, and stories260k where the shared inputs are beside the checkout, with both
methods, and scores text that calibration has not seen: WikiText-2's validation set calibrates and
its test set scores; the demo's corpus calibrates and fresh text of the same kind scores.
"""

import math
import tempfile
from pathlib import Path

import torch
from measure import options

from loram_cli.config.defaults import model_dir
from loram_cli.demo.problems import corpus
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.quiet import quiet_libraries
from loram_cli.reporting import NullReporter
from loram_cli.stages.prune.stage import PruneSpec, run

SHARED = Path(__file__).resolve().parents[3] / "shared"
EVALUATED_CHARS = 60_000


@torch.no_grad()
def score(model: Path, text: str, length: int) -> float:
    """Perplexity over windows of ``length`` tokens, side by side."""
    with quiet_libraries():
        loaded = load_causal_lm(model, device="cpu")
        ids = load_tokenizer(model)(text, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    total = 0.0
    for batch in windows.split(16):
        total += loaded(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    return math.exp(total / len(windows))


def row(label: str, base: Path, calibration: str, length: int, text: str) -> None:
    cells = [f"{score(base, text, length):>9.2f}"]
    for strategy in ("unst", "semi"):
        for importance in ("l2", "sparsegpt"):
            with tempfile.TemporaryDirectory(prefix="loram-bench-") as folder:
                out = Path(folder) / "pruned"
                spec = PruneSpec(
                    model=base, out=out, strategy=strategy, ratio=0.5, importance=importance,
                    calibration=calibration, calibration_length=length, device="cpu",
                )  # fmt: skip
                run(spec, NullReporter())
                cells.append(f"{score(out, text, length):>11.2f}")
    print(f"{label:<26}" + "".join(cells), flush=True)


def main() -> None:
    options(__doc__).parse_args()
    demo = model_dir("demo")
    print(
        f"perplexity; half of the decoder linears' weights zero; {EVALUATED_CHARS:,} characters at most"
    )
    print(
        f"{'model, text':<26}{'dense':>9}{'unst l2':>11}{'sparsegpt':>11}{'semi l2':>11}{'sparsegpt':>11}"
    )
    # The kind of text that the base was trained on, from a seed that nothing else uses.
    row("demo base, demo text", demo, "demo:corpus", 192, "\n\n".join(corpus(200, seed=3)))
    if not SHARED.is_dir():
        print("(WikiText-2 and stories260k are not beside the checkout)")
        return
    calibration = str(SHARED / "data" / "wikitext2_valid.txt")
    text = (SHARED / "data" / "wikitext2_test.txt").read_text("utf-8")[:EVALUATED_CHARS]
    row("stories260k, WikiText-2", SHARED / "models" / "stories260k", calibration, 256, text)
    row("demo base, WikiText-2", demo, calibration, 256, text)


if __name__ == "__main__":
    main()
