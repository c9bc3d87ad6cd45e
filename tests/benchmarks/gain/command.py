"""How much of full LoRA's gain each small model keeps, on a real base: ``make bench-gain``.

Every row goes through the product's own commands: prune, align, train, recover, and some exact
steps on the full model. Kept is (base - recovered) / (base - full LoRA), in loss a token on
held-out answers. ``results.json`` is written after every row, and the same command resumes there;
the outputs of every command lie under ``work/`` and are made once.

    make bench-gain ARGS="--model DIR --train-data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl \\
        --text wikitext_valid.txt --text-eval wikitext_test.txt"
    make bench-gain ARGS="--model DIR ... --only full,nf4"

It takes about ten minutes a row on two cores, for a base of 135M parameters.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gain.frontier import write_frontier
from gain.report import write_report
from gain.rows import FULL, ROWS, Row, named
from gain.work import Bench, measure, measure_polished, measure_scaled
from loram_cli.modeling.load import slow_in_bf16
from loram_cli.schema import digest_of, plain

Figures = dict[str, Any]


def main(words: list[str] | None = None) -> int:
    """Run the rows that are left, and write the table and the picture."""
    options = _options(words)
    precision = options.precision or ("fp32" if slow_in_bf16("cpu") else "bf16")
    bench = Bench(
        model=options.model.resolve(),
        out=options.out.resolve(),
        train_data=str(Path(options.train_data).resolve()),
        eval_data=str(Path(options.eval_data).resolve()),
        text=str(Path(options.text).resolve()),
        text_eval=options.text_eval.resolve(),
        eval_examples=options.eval_examples,
        block_length=options.block_length,
        train=(*options.train.split(), "--precision", precision),
    )
    polish = tuple(int(count) for count in options.polish.split(",") if count)
    chosen = ROWS
    if options.only:
        chosen = named(tuple(options.only.split(",")))
    elif options.quick:
        chosen = tuple(row for row in ROWS if row.quick)
    file = bench.out / "results.json"
    bench.out.mkdir(parents=True, exist_ok=True)
    done: dict[str, Figures] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for row, seed in _todo(chosen, options.seeds):
        key = f"{row.name}@{seed}"
        settings = digest_of({"row": plain(row.deciding()), "bench": bench.deciding()})
        known = done.get(key, {})
        if known.get("settings") != settings:
            known = {"settings": settings, "seed": seed}
        known |= {"name": row.name, "label": row.label}
        # Written after every training, so that an interruption costs no more than one.
        for found in _measured(row, seed, bench, polish, known):
            print(f"{key}: {row.label}\n    {_told(found)}", flush=True)
            known = done[key] = {**known, **found}
            file.write_text(json.dumps(done, indent=1) + "\n", "utf-8")
    base = options.base_name or bench.model.name
    print(write_report(done, base, bench.out))
    if options.docs is not None:
        write_report(done, base, options.docs, docs=True)
    if options.frontier is not None:
        write_frontier(done, base, options.frontier)
    return 0


def _measured(
    row: Row, seed: int, bench: Bench, polish: tuple[int, ...], known: Figures
) -> Iterator[Figures]:
    """What of a row is not known yet, one training after the other."""
    if "loss_recovered" not in known:
        yield measure(row, seed, bench)
    if row.scaled and "loss_scaled" not in known:
        yield measure_scaled(row, seed, bench)
    for steps in polish if row.polish else ():
        if f"loss_polished_{steps}" not in known:
            yield measure_polished(row, seed, bench, steps)


def _todo(rows: tuple[Row, ...], seeds: int) -> list[tuple[Row, int]]:
    """The first seed of every row before the second of any."""
    found = [(row, 1) for row in rows]
    for seed in range(2, seeds + 1):
        found += [(row, seed) for row in rows if row.decides or row.name == FULL]
    return found


def _told(figures: Figures) -> str:
    names = (
        "bytes",
        "loss_before",
        "loss_small",
        "loss_recovered",
        "scale",
        "loss_scaled",
        "align_seconds",
    )
    told = (*names, *(name for name in figures if name.startswith("loss_polished_")))
    return ", ".join(f"{name} {figures[name]}" for name in told if figures.get(name) is not None)


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the base: a Hugging Face directory")
    add("--train-data", required=True, help="instructions to train on")
    add("--eval-data", required=True, help="held-out instructions")
    add("--text", required=True, help="general text to align on")
    add("--text-eval", type=Path, required=True, help="general text that is held out")
    add("--eval-examples", type=int, default=100)
    add("--block-length", type=int, default=512, help="tokens of a window of text")
    add("--out", type=Path, default=Path("bench-gain"), help="results and work; resumable")
    add("--only", default="", help=f"rows, by commas: {', '.join(row.name for row in ROWS)}")
    add("--quick", action="store_true", help="the rows that compare with QLoRA")
    add("--seeds", type=int, default=1, help="seeds of the rows that decide")
    add(
        "--train",
        default=_TRAIN,
        help="flags of every training (default: 40 steps of 8, rank 8, rate 5e-4, 320 tokens)",
    )
    add("--precision", help="of every training (default: bf16; fp32 on a CPU that is slow in it)")
    add("--polish", default="10", help="exact steps after recovery, by commas (default: 10)")
    add("--docs", type=Path, help="also put the rows into gain.md's table there, and draw gain.png")
    add("--frontier", type=Path, help="also write what prune --fit-memory chooses by there")
    add("--base-name", default="", help="the base's name there (default: its directory's)")
    return parser.parse_args(words)


_TRAIN = (
    "--steps 40 --batch 8 --micro-batch 4 --rank 8 --learning-rate 5e-4 --warmup-steps 4 "
    "--dropout 0 --max-length 320"
)
