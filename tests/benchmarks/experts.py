"""How much of full LoRA's gain is kept when experts are dropped: ``make bench-experts``.

Fine-tunes one small mixture of experts in many ways with equal data, steps and seeds, and measures
held-out loss and exact match of the answers: full LoRA on the base; LoRAM with shares of the
experts dropped, by each importance, aligned or not, factors on the attention alone or on the
experts as well. The share kept is (LoRAM - base) / (full LoRA with the same targets - base). Every
finished measurement is a line in ``results.jsonl``; the same command goes on after an interruption.

    python tests/benchmarks/train_base.py --mixture --out bench-experts/base
    python tests/benchmarks/experts.py --base bench-experts/base
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from quality import SILENT, parse_methods, score

from loram_cli.config.recipe import demo_recipe
from loram_cli.schema import digest_of
from loram_cli.stages.align import stage as align
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SCORES = ("loss", "exact")
# As recovered, and with --fit-scale.
HOW = ("", "scaled_")
Row = dict[str, Any]
TARGETS = {"attention": (*ATTENTION, "lm_head"), "experts": (*ATTENTION, "lm_head", "experts")}


@dataclass(frozen=True)
class Cell:
    """One way to fine-tune. Without an importance it is LoRA on the base itself.

    Attributes:
        seed: Of every stage.
        targets: ``attention``, or ``experts`` for factors on these as well.
        importance: How experts are ranked.
        ratio: Share of them that goes.
        method: Of alignment; empty for none.
    """

    seed: int
    targets: str
    importance: str | None = None
    ratio: float = 0.0
    method: tuple[str, ...] = ()

    @property
    def pruned(self) -> str:
        """Name of the pruned model's directory, which cells share."""
        return f"pruned-{self.importance}-{self.ratio:g}-{self.seed}"

    @property
    def source(self) -> str:
        """Name of the directory with the small model that is trained on."""
        return f"{self.pruned}-{'+'.join(self.method)}" if self.method else self.pruned


def cells(options: argparse.Namespace) -> list[Cell]:
    """What is measured, in that order: the first ratio of every seed before the next ratio."""
    found = [Cell(seed, targets) for seed in options.seeds for targets in options.targets]
    for ratio in options.ratios:
        for seed in options.seeds:
            for importance in options.importances:
                for method in options.methods:
                    found += [Cell(seed, t, importance, ratio, method) for t in options.targets]
    return found


def measure(cell: Cell, options: argparse.Namespace) -> Row:
    """Fine-tune as the cell says, and score the full model with what came out."""
    begun = time.monotonic()
    work = options.out / "work"
    source = small_model(cell, options)
    adapter = work / "adapter"
    spec = train.TrainSpec(
        source=source, out=adapter, data=options.train_data, seed=cell.seed, force=True,
        targets=TARGETS[cell.targets], **options.train,
    )  # fmt: skip
    trained = train.run(spec, SILENT).manifest
    figures = {**asdict(cell), "trained_on_params": trained.results["trained_on_params"]}
    if cell.importance is None:
        figures |= score(options, options.base, adapter)
    else:
        figures |= score(options, options.base, recovered(adapter, False, options).wrote)
        scaled = recovered(adapter, True, options)
        figures["scale"] = scaled.manifest.results["scale"]
        again = score(options, options.base, scaled.wrote)
        figures |= {f"scaled_{what}": value for what, value in again.items()}
    return figures | {"seconds": round(time.monotonic() - begun, 1)}


def recovered(adapter: Path, fit_scale: bool, options: argparse.Namespace) -> StageResult:
    """An adapter at the base's shapes, as it is or scaled."""
    out = options.out / "work" / "recovered"
    spec = recover.RecoverSpec(
        adapter=adapter, model=options.base, out=out, force=True, fit_scale=fit_scale
    )
    return recover.run(spec, SILENT)


def small_model(cell: Cell, options: argparse.Namespace) -> Path:
    """The model that a cell trains on; what is there already is used again."""
    if cell.importance is None:
        return options.base
    work = options.out / "work"
    pruned, out = work / cell.pruned, work / cell.source
    prune.run(
        prune.PruneSpec(
            model=options.base, out=pruned, experts_ratio=cell.ratio, seed=cell.seed,
            experts_importance=cell.importance, **options.prune,
            calibration=None if cell.importance == "rand" else options.calibration,
        ),
        SILENT,
    )  # fmt: skip
    if cell.method:
        spec = align.AlignSpec(
            source=pruned, out=out, method=cell.method, model=options.base, seed=cell.seed,
            data=options.text, **options.align,
        )  # fmt: skip
        align.run(spec, SILENT)
    return out


def report(rows: list[Row], options: argparse.Namespace) -> str:
    """The tables, by where the factors are: a row an importance and alignment, a column a ratio.

    A cell is the share kept of the gain in loss and in exact match, as recovered and scaled.
    """
    return "\n\n".join(_table(rows, targets, options) for targets in options.targets)


def _table(rows: list[Row], targets: str, options: argparse.Namespace) -> str:
    mine = [row for row in rows if row["targets"] == targets]
    base = next(row for row in rows if row["targets"] == "none")
    full = {row["seed"]: row for row in mine if row["importance"] is None}
    kept: dict[tuple[str, tuple[str, ...], float], list[Row]] = defaultdict(list)
    for row in mine:
        if row["importance"] is not None and row["seed"] in full:
            best = full[row["seed"]]
            shares = {
                f"{how}{what}": _share(row[f"{how}{what}"], base[what], best[what])
                for how in HOW
                for what in SCORES
            }
            kept[row["importance"], tuple(row["method"]), row["ratio"]].append(shares)
    ratios = sorted(options.ratios)
    lines = [
        f"Factors on {targets}: " + "; ".join(
            f"{name}: loss {mean(r['loss'] for r in ends.values()):.3f}, "
            f"exact match {mean(r['exact'] for r in ends.values()):.2f}"
            for name, ends in (("base", {0: base}), ("full LoRA", full)) if ends
        ),
        "",
        "| experts by | aligned by | "
        + " | ".join(f"{r:g} dropped | scaled" for r in ratios)
        + " |",
        "| --- | --- |" + " --: | --: |" * len(ratios),
    ]  # fmt: skip
    for importance in options.importances:
        for method in options.methods:
            found = [kept.get((importance, method, ratio), []) for ratio in ratios]
            cells = [
                " / ".join(_mean(shares, f"{how}{what}") for what in SCORES)
                for shares in found
                for how in HOW
            ]
            aligned = ", then ".join(method) or "nothing"
            lines.append(f"| {importance} | {aligned} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(found: float, base: float, full: float) -> float | None:
    """Of full LoRA's gain; None where that has gained nothing."""
    return (found - base) / (full - base) if full != base else None


def _mean(shares: list[Row], what: str) -> str:
    values = [row[what] for row in shares if row[what] is not None]
    return f"{mean(values):.2f}" if values else "-"


def main() -> None:
    """Measure what is not there yet, and write the tables."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    deciding = ("base", "text", "calibration", "train_data", "eval_data", "eval_examples")
    settings = digest_of(
        {key: str(getattr(options, key)) for key in deciding}
        | {"prune": options.prune, "align": options.align, "train": options.train}
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    rows = [row for row in rows if row["settings"] == settings]
    if not rows:
        # Outputs of other settings are not taken for those of these.
        shutil.rmtree(options.out / "work", ignore_errors=True)
        rows = [{"targets": "none", **score(options, options.base)}]
        _keep(file, settings, "base", rows[0])
    done = {row["cell"] for row in rows}
    todo = [cell for cell in cells(options) if digest_of(asdict(cell)) not in done]
    for number, cell in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {cell}", flush=True)
        row = measure(cell, options)
        _keep(file, settings, digest_of(asdict(cell)), row)
        rows.append(row)
        print(f"    loss {row['loss']} exact {row['exact']} in {row['seconds']} s", flush=True)
    text = report(rows, options)
    (options.out / "table.md").write_text(text + "\n", "utf-8")
    print(text)


def _keep(file: Path, settings: str, cell: str, row: Row) -> None:
    row |= {"settings": settings, "cell": cell}
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def _options() -> argparse.Namespace:
    recipe = demo_recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--base", type=Path, required=True, help="mixture of experts, such as train_base.py's")
    add("--text", default="demo:corpus", help="text to align on")
    add("--calibration", default="demo:calibration", help="text to rank experts on")
    add("--train-data", default="demo:train")
    add("--eval-data", default="demo:validation")
    add("--eval-examples", type=int, default=100)
    add("--out", type=Path, default=Path("bench-experts"), help="results and work; resumable")
    add("--ratios", default="0.5,0.25,0.75", help="shares of the experts, in this order")
    add("--importances", default="reap,frequency,taylor,rand")
    add("--methods", default="none,reconstruct")
    add("--targets", default="attention,experts", help="where the factors are")
    add("--seeds", default="1")
    add("--align-steps", type=int, default=30, help="of pretrain and distill, where chosen")
    add("--expert-steps", type=int, help="of reconstruct (default: align's)")
    add("--max-new-tokens", type=int, default=110)
    options = parser.parse_args()
    options.ratios = [float(word) for word in options.ratios.split(",")]
    options.importances = options.importances.split(",")
    options.methods = parse_methods(options.methods)
    options.targets = options.targets.split(",")
    options.seeds = [int(word) for word in options.seeds.split(",")]
    options.no_exact = False
    options.prune = {"calibration_samples": 64, "calibration_length": 192}
    # As quality.py: fewer steps than the recipe's, so that the ways are still apart.
    small = {"batch": 16, "micro_batch": 16, "eval_steps": 1000}
    section = {**recipe.section("align"), **small, "steps": options.align_steps}
    options.align = {k: v for k, v in section.items() if k not in ("data", "method")}
    if options.expert_steps is not None:
        options.align["expert_steps"] = options.expert_steps
    section = {**recipe.section("train"), **small, "steps": 40, "eval_steps": 20, "dropout": 0.0}
    options.train = {k: v for k, v in section.items() if k not in ("data", "eval_data")}
    return options


if __name__ == "__main__":
    main()
