"""SFT, then DPO and GRPO, on the demo base: what they bring on the small and the recovered model.

    python tests/bench/objectives.py RUN_DIRECTORY [--sft-steps 30] [--dpo-steps 40] ...

Runs the commands that docs/objectives.md names, then measures on held-out data that no training
saw: preferences (accuracy by likelihood, and DPO's reward margin over the supervised adapter), and
GSM8K-style exact match by ``loram eval``. What is done in the directory already is not redone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from loram_cli.cli.app import run_command
from loram_cli.modeling.narrow import load_causal_lm, load_tokenizer
from loram_cli.reporting import NullReporter
from loram_cli.stages.resolve import model_dir
from loram_cli.training.adapters import load_adapter
from loram_cli.training.jobs import pad_token_id
from loram_cli.training.preferences import PairRow, load_preferences, tokenize_pairs

BETA = 0.1


def loram(*words: object) -> None:
    """Run one command, which must succeed."""
    line = [str(word) for word in words]
    print("loram", *line, flush=True)
    if run_command(line):
        raise SystemExit(1)


def log_probs(model: Any, rows: list[PairRow], side: str, batch: int = 50) -> torch.Tensor:
    """Log-probability of one side's answers, shape (rows,)."""
    totals = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        whole = [[*row.prompt_ids, *getattr(row, side)] for row in part]
        longest = max(map(len, whole))
        ids = torch.full((len(part), longest), pad_token_id(model))
        scored = torch.zeros(len(part), longest - 1)
        for i, (row, line) in enumerate(zip(part, whole, strict=True)):
            ids[i, : len(line)] = torch.tensor(line)
            scored[i, len(row.prompt_ids) - 1 : len(line) - 1] = 1
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        totals.append((picked * scored).sum(1))
    return torch.cat(totals)


def differences(model_path: Path, adapter: Path | None, rows: list[PairRow]) -> torch.Tensor:
    """By how much a model finds each chosen answer likelier than the rejected one, in nats."""
    model = load_causal_lm(model_path, dtype=torch.float32, device="cpu")
    if adapter is not None:
        model = load_adapter(model, adapter)
    return log_probs(model, rows, "chosen_ids") - log_probs(model, rows, "rejected_ids")


def main() -> None:
    """Train, recover and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sft-steps", default=30)
    parser.add_argument("--dpo", default="", help="More words for the DPO command.")
    parser.add_argument("--grpo", default="", help="More words for the GRPO command.")
    parser.add_argument("--skip", default="", help="dpo or grpo.")
    parser.add_argument("--limit", default=200, help="Word problems to evaluate on.")
    asked = parser.parse_args()
    run = asked.run
    objectives = [name for name in ("dpo", "grpo") if name != asked.skip]
    if not (run / "aligned").exists():
        loram("prune", "--run", run)
        loram("align", "--run", run)
    loram("train", "--run", run, "--steps", asked.sft_steps)
    loram("recover", "--run", run, "--in", run / "adapter", "--out", run / "recovered-sft")
    for name in objectives:
        words = getattr(asked, name).split()
        loram("train", "--run", run, "--objective", name, *words)
        places = ("--in", run / f"adapter-{name}", "--out", run / f"recovered-{name}")
        loram("recover", "--run", run, *places)
    base, small = model_dir("demo"), run / "aligned"
    pairs = load_preferences("demo:preferences-test")
    rows = tokenize_pairs(pairs, load_tokenizer(base), 192, NullReporter())
    for label, model, prefix in (("small", small, "adapter"), ("full", base, "recovered")):
        suffix = "" if prefix == "adapter" else "-sft"
        reference = differences(model, run / f"{prefix}{suffix}", rows)
        told = {
            "model": label,
            "pairs": len(rows),
            "none": round(share(differences(model, None, rows)), 3),
        }
        told["sft"] = round(share(reference), 3)
        for name in objectives:
            mine = differences(model, run / f"{prefix}-{name}", rows)
            margin = BETA * (mine - reference)
            told[name] = round(share(mine), 3)
            told[f"{name}_reward_accuracy"] = round(share(margin), 3)
            told[f"{name}_reward_margin"] = round(float(margin.mean()), 3)
        print(json.dumps(told), flush=True)
    more = [("--row", f"{n}={base}+{run / f'recovered-{n}'}") for n in ("sft", *objectives)]
    small_rows = [("--row", f"small-{n}={small}+{run / a}") for n, a in
                  (("sft", "adapter"), *((n, f"adapter-{n}") for n in objectives))]  # fmt: skip
    flat = [word for pair in (*more, *small_rows) for word in pair]
    loram("eval", "--run", run, "--tasks", "gsm8k", "--rows", "base", "--limit", asked.limit, *flat)


def share(values: torch.Tensor) -> float:
    """Of values above zero."""
    return float((values > 0).float().mean())


if __name__ == "__main__":
    main()
