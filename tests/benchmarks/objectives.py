"""SFT, then DPO and GRPO, on the demo base: by LoRAM and by full LoRA at the same steps.

    python tests/benchmarks/objectives.py RUN_DIRECTORY [--sft="--steps 8"] [--grpo="--steps 40"] ...

Runs commands that docs/objectives.md names, then measures on held-out data that no training saw:
strict match of word problems by ``loram eval``, and of two kinds of preferences the share whose
chosen answer is likelier than the rejected one, and DPO's reward margin over the supervised
adapter. Rows are the small model with its adapter, the full model with the recovered one, and the
full model with LoRA that was trained on it. What is done in the directory already is not redone.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import options

from loram_cli.cli.app import run_command
from loram_cli.config.defaults import model_dir
from loram_cli.evaluation.comparison import score_text
from loram_cli.evaluation.intervals import normal_interval, wilson_interval
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import load_adapter
from loram_cli.training.data.preferences import PairRow, load_preferences, tokenize_pairs
from loram_cli.training.loop.job import pad_token_id

BETA = 0.1
SHORT = "--steps 20 --warmup-steps 2 --eval-steps 20"
# What is trained on top of SFT: the objective, its data, and held-out pairs like it.
STYLE, SLIPS = "demo:preferences-test", "demo:slips-test"
SLIP_DATA = ("--data", "demo:slips", "--eval-data", "demo:slips-validation")
BEYOND: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo": ("dpo", ()),
    "dpo-slips": ("dpo", SLIP_DATA),
    "grpo": ("grpo", ()),
}


@dataclass(frozen=True)
class Row:
    """A model of the table: a way to train, and what with."""

    label: str
    model: Path
    adapters: dict[str, Path]


def loram(*words: object) -> None:
    """Run one command, which must succeed."""
    line = [str(word) for word in words]
    print("loram", *line, flush=True)
    if run_command(line):
        raise SystemExit(1)


def train_all(run: Path, asked: argparse.Namespace) -> list[Row]:
    """Train each objective on the small model and on the base, and recover the former."""
    if not (run / "aligned").exists():
        loram("prune", "--run", run)
        loram("align", "--run", run)
    base, small = model_dir("demo"), run / "aligned"
    adapters: dict[str, dict[str, Path]] = {"small": {}, "recovered": {}, "full-lora": {}}
    for name in ("sft", *BEYOND):
        objective, more = BEYOND.get(name, ("sft", ()))
        more = (*more, *getattr(asked, name.partition("-")[0]).split())
        for prefix, source in (("small", small), ("full-lora", base)):
            out = adapters[prefix][name] = run / f"{prefix}-{name}"
            first = () if name == "sft" else ("--from-adapter", run / f"{prefix}-sft")
            places = ("--run", run, "--in", source, "--out", out, *first)
            loram("train", "--objective", objective, *places, *more)
        out = adapters["recovered"][name] = run / f"recovered-{name}"
        loram("recover", "--run", run, "--in", run / f"small-{name}", "--out", out)
    models = {"small": small, "recovered": base, "full-lora": base}
    return [Row(label, models[label], found) for label, found in adapters.items()]


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


def differences(
    model_path: Path, adapter: Path | None, kinds: dict[str, list[PairRow]]
) -> dict[str, torch.Tensor]:
    """By how much a model finds each chosen answer likelier than the rejected one, in nats."""
    model = load_causal_lm(model_path, dtype=torch.float32, device="cpu")
    if adapter is not None:
        model = load_adapter(model, adapter)
    return {
        kind: log_probs(model, rows, "chosen_ids") - log_probs(model, rows, "rejected_ids")
        for kind, rows in kinds.items()
    }


def preference_scores(rows: list[Row]) -> dict[str, dict[str, str]]:
    """Per model of the table, what it makes of the pairs."""
    base = model_dir("demo")
    tokenizer = load_tokenizer(base)
    kinds = {
        name: tokenize_pairs(load_preferences(source), tokenizer, 192, NullReporter())
        for name, source in (("style", STYLE), ("slips", SLIPS))
    }
    nothing = {k: (v, v * 0) for k, v in differences(base, None, kinds).items()}
    found = {"base": {kind: pair_text(*values) for kind, values in nothing.items()}}
    for row in rows:
        start = differences(row.model, row.adapters["sft"], kinds)
        for name, adapter in row.adapters.items():
            mine = differences(row.model, adapter, kinds)
            found[f"{row.label}-{name}"] = {
                kind: pair_text(mine[kind], BETA * (mine[kind] - start[kind])) for kind in kinds
            }
    return found


def pair_text(values: torch.Tensor, margins: torch.Tensor) -> str:
    """Share of pairs whose chosen answer is likelier, and the mean reward margin."""
    share = float((values > 0).float().mean())
    low, high = wilson_interval(share * len(values), len(values))
    text = f"{share * 100:.1f} ±{max(high - share, share - low) * 100:.1f} | "
    if not margins.any():
        return text + "-"
    mean = float(margins.mean())
    _, high = normal_interval(mean, float(margins.std()) / len(margins) ** 0.5)
    return text + f"{mean:.2f} ±{high - mean:.2f}"


def main() -> None:
    """Train, recover and measure."""
    parser = options(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sft", default="--steps 5 --warmup-steps 2 --eval-steps 5")
    parser.add_argument("--dpo", default=f"{SHORT} --learning-rate 1e-3")
    parser.add_argument("--grpo", default=f"{SHORT} --learning-rate 2e-3")
    parser.add_argument("--limit", default=200, help="Word problems to evaluate on.")
    asked = parser.parse_args()
    begun = time.monotonic()
    rows = train_all(asked.run, asked)
    named = {f"{row.label}-{n}": (row.model, a) for row in rows for n, a in row.adapters.items()}
    words = [w for n, (m, a) in named.items() for w in ("--row", f"{n}={m}+{a}")]
    places = ("--run", asked.run, "--rows", "base", "--limit", asked.limit)
    loram("eval", "--tasks", "gsm8k", *places, *words)
    told = json.loads((asked.run / "eval" / "results.json").read_text())["rows"]
    scores = {n: next(s for s in r["scores"] if "strict" in s["metric"]) for n, r in told.items()}
    print(table(scores, preference_scores(rows)))
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")


def table(scores: dict[str, dict[str, Any]], pairs: dict[str, dict[str, str]]) -> str:
    """All models, and how much of the gain of an objective over SFT LoRAM keeps of full LoRA's."""
    lines = ["", "| model | strict match | style: likelier | margin | slips: likelier | margin |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, score in scores.items():
        told = pairs[name]
        lines.append(f"| {name} | {score_text(score)} | {told['style']} | {told['slips']} |")
    lines.append("")
    for name in BEYOND:
        mine, theirs = (
            100 * (scores[f"{way}-{name}"]["value"] - scores[f"{way}-sft"]["value"])
            for way in ("recovered", "full-lora")
        )
        kept = f": {mine / theirs:.0%}" if theirs > 0 else ""
        lines.append(f"{name}: strict match {mine:+.1f} by LoRAM, {theirs:+.1f} by full LoRA{kept}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
