"""Held-out loss by learning rate, rank and warm-up: where train's defaults come from.

    python tests/benchmarks/defaults.py RUN_DIRECTORY [--rates 1e-4,1e-3] [--train="--max-length 320"]

Trains the run's small model, which the demo's settings make where there is none, once for each rate
at rank 8 and a warm-up of 3%, then at the best rate once for each rank and each warm-up. Alpha is
twice the rank. Every adapter is recovered and scored on the full model (``--score-recovered``), so
the best is what the whole chain makes best. A training that is done already is not redone.
"""

import argparse
from itertools import chain
from pathlib import Path

from measure import options
from objectives import loram

from loram_cli.runs.manifest import MANIFEST_NAME, Manifest

RANK, WARM_UP = 8, 0.03
DEMO = "--data demo:train --eval-data demo:validation --eval-examples 200 --max-length 192"


def losses(
    asked: argparse.Namespace, rate: float, rank: int = RANK, warm_up: float = WARM_UP
) -> list[float]:
    """Mean held-out losses of a setting over its seeds: small model, full model."""
    found = []
    for seed in range(1, asked.seeds + 1):
        length = f"{asked.steps}x{asked.batch}"
        out = asked.run / f"rate-{rate:g}-rank-{rank}-warm-up-{warm_up:g}-{length}-seed-{seed}"
        if not (out / MANIFEST_NAME).is_file():
            loram(
                "train", "--run", asked.run, "--out", out, "--score-recovered", "--keep", "last",
                "--steps", asked.steps, "--batch", asked.batch, "--micro-batch", asked.batch,
                "--eval-steps", asked.steps, "--save-steps", asked.steps,
                "--learning-rate", rate, "--rank", rank, "--alpha", 2 * rank,
                "--warmup-steps", round(warm_up * asked.steps), "--seed", seed,
                *asked.train.split(),
            )  # fmt: skip
        results = Manifest.read(out).results
        found.append((results["eval_loss_after"], results["recovered_loss_after"]))
        asked.before = (results["eval_loss_before"], results["recovered_loss_before"])
    return [sum(column) / len(column) for column in zip(*found, strict=True)]


def main() -> None:
    """Train them all, and print the table."""
    parser = options(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rates", default="5e-5,1e-4,2e-4,5e-4,1e-3,2e-3,5e-3")
    parser.add_argument("--ranks", default="4,8,16")
    parser.add_argument("--warm-ups", default="0,0.03,0.1", help="Shares of the steps.")
    parser.add_argument("--steps", default=60, type=int)
    parser.add_argument("--batch", default=16, type=int)
    parser.add_argument("--seeds", default=1, type=int, help="Their losses are averaged.")
    parser.add_argument("--train", default=DEMO, help="Further flags of every training.")
    asked = parser.parse_args()
    if not (asked.run / "pruned").exists():
        loram("prune", "--run", asked.run)
        loram("align", "--run", asked.run)
    rates = {float(rate): losses(asked, float(rate)) for rate in asked.rates.split(",")}
    best = min(rates, key=lambda rate: rates[rate][1])
    ranks = {int(r): losses(asked, best, rank=int(r)) for r in asked.ranks.split(",")}
    warm_ups = {float(w): losses(asked, best, warm_up=float(w)) for w in asked.warm_ups.split(",")}
    small, full = asked.before
    print(f"\n{asked.steps} steps of {asked.batch} examples; then at a rate of {best:g}\n")
    print(f"| setting | small model, {small:.4f} before | full model, {full:.4f} before |")
    print("| --- | --- | --- |")
    rows = chain(
        ((f"rate {rate:g}", row) for rate, row in rates.items()),
        ((f"rank {rank}", row) for rank, row in ranks.items()),
        ((f"warm-up {warm_up:.0%}", row) for warm_up, row in warm_ups.items()),
    )
    for name, (small, full) in rows:
        print(f"| {name} | {small:.4f} | {full:.4f} |")


if __name__ == "__main__":
    main()
