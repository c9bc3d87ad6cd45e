"""How much of full LoRA's gain LoRAM keeps: ``make bench-quality``.

Fine-tunes one base in many ways with equal data, steps and seeds, and measures held-out loss and
exact match of the answers: full LoRA on the base; LoRAM (pruned, aligned by each method or not,
trained, recovered); the same small model and adapter without recovery; LoRAM in NF4. Gain
retention is (LoRAM - base) / (full LoRA - base), as in the paper's Table 7. Every finished
measurement is a line in ``results.jsonl``; the same command goes on after an interruption.

    python tests/benchmarks/quality.py --quick
    python tests/benchmarks/quality.py --base DIR --text text.jsonl --train-data train.jsonl \\
        --eval-data test.jsonl --ratios 0.5,0.85
"""

import argparse
import json
import re
import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from directions import gradient_cosines, update_cosines
from quality_report import write_report

from loram_cli.config.recipe import demo_recipe
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.reporting import NullReporter
from loram_cli.schema import digest_of
from loram_cli.stages.align import stage as align
from loram_cli.stages.prune import stage as prune
from loram_cli.stages.recover import stage as recover
from loram_cli.stages.train import stage as train
from loram_cli.training.adapters import load_adapter
from loram_cli.training.data.documents import Example, load_instructions
from loram_cli.training.data.tokens import IGNORED_LABEL, PadCollator, tokenize_examples

SILENT = NullReporter()
_MARKED = re.compile(r"####\s*(-?[\d.,]+)")


@dataclass(frozen=True)
class Cell:
    """One way to fine-tune. Without a strategy it is LoRA on the base itself."""

    seed: int
    strategy: str | None = None
    ratio: float = 0.0
    method: tuple[str, ...] = ()
    quantize: str | None = None

    @property
    def place(self) -> str:
        """Name of the pruned model's directory."""
        return f"{self.strategy}-{self.ratio:g}-{self.seed}"

    @property
    def source(self) -> str:
        """Name of the directory with the small model that is trained on."""
        if not self.method:
            return f"pruned-{self.place}"
        return f"aligned-{self.place}-{'+'.join(self.method)}"

    @property
    def name(self) -> str:
        """Names the directories of its adapters, behind ``adapter-`` and ``recovered-``."""
        return f"{self.place}-{'+'.join(self.method)}-{self.quantize}"


def parse_methods(text: str) -> list[tuple[str, ...]]:
    """Such as ``none,reconstruct+pretrain``."""
    return [() if word == "none" else tuple(word.split("+")) for word in text.split(",")]


def cells(options: argparse.Namespace) -> list[Cell]:
    found = []
    for seed in options.seeds:
        found.append(Cell(seed))
        for strategy in options.strategies:
            for ratio in [0.5] if strategy == "semi" else options.ratios:
                for method in options.methods:
                    if strategy in ("semi", "unst") and "reconstruct" in method:
                        continue
                    found.append(Cell(seed, strategy, ratio, method))
        if not options.no_nf4:
            ratio, method = options.ratios[-1], options.methods[-1]
            found.append(Cell(seed, options.strategies[0], ratio, method, "nf4"))
    return found


def measure(cell: Cell, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fine-tune as the cell says; one row per model that comes out."""
    begun = time.monotonic()
    work, base = options.out / "work", options.base
    source, aligned = base, None
    if cell.strategy:
        source = work / f"pruned-{cell.place}"
        keep = {"keep_first": options.keep_first, "keep_last": options.keep_last}
        text = options.calibration
        if cell.strategy == "stru":
            # The paper's ranking, which the page on it compares.
            keep["importance"] = "taylor"
        if cell.strategy in ("semi", "unst"):
            # SparseGPT wants far more text than a ranking does.
            text = options.text
            keep = {"calibration_length": options.align["block_length"]}
        prune.run(
            prune.PruneSpec(
                model=base, out=source, strategy=cell.strategy, ratio=cell.ratio, seed=cell.seed,
                calibration=text, **keep,
            ),
            SILENT,
        )  # fmt: skip
    if cell.method:
        out = work / cell.source
        spec = align.AlignSpec(
            source=source, out=out, method=cell.method, model=base, seed=cell.seed,
            data=options.text, **options.align,
        )  # fmt: skip
        aligned = align.run(spec, SILENT).manifest
        source = out
    adapter = work / f"adapter-{cell.name}"
    spec = train.TrainSpec(
        source=source, out=adapter, data=options.train_data, seed=cell.seed,
        quantize=cell.quantize, **options.train,
    )  # fmt: skip
    trained = train.run(spec, SILENT).manifest
    row = {
        **asdict(cell),
        "trained_on_params": trained.results["trained_on_params"],
        "weight_bytes": _weight_bytes(trained.results["trained_on_params"], cell.quantize),
        "train_peak_bytes": trained.peak_memory_increase_bytes,
        "train_seconds": round(trained.wall_seconds, 1),
        "align_seconds": round(aligned.wall_seconds, 1) if aligned else 0.0,
        "align_tokens": aligned.results["tokens"] if aligned else 0,
        "align_eval_loss": aligned.results["eval_loss_after"] if aligned else None,
    }
    if not cell.strategy:
        return [
            {**row, "row": "base", **score(options, base)},
            {**row, "row": "full", **score(options, base, adapter)},
        ]
    recovered = work / f"recovered-{cell.name}"
    recover.run(recover.RecoverSpec(adapter=adapter, model=base, out=recovered), SILENT)
    full = work / f"adapter-{Cell(cell.seed).name}"
    row["update_cosines"] = update_cosines(recovered, full)
    row["gradient_cosines"] = gradient_cosines(
        base, source, trained.keep, options.train_data, options.train["max_length"]
    )
    rows = [{**row, "row": "loram", **score(options, base, recovered)}]
    if not cell.quantize:
        rows.append({**row, "row": "small", **score(options, source, adapter)})
    for row in rows:
        row["seconds"] = round(time.monotonic() - begun, 1)
    return rows


def _weight_bytes(params: int, quantize: str | None) -> int:
    """bf16, or the paper's count of NF4."""
    return params // 2 if quantize else params * 2


def score(options: argparse.Namespace, model_dir: Path, *adapters: Path) -> dict[str, Any]:
    """Held-out loss per answer token, and exact match where the answers mark their result."""
    model = load_causal_lm(model_dir, dtype="float32")
    for adapter in adapters:
        model = load_adapter(model, adapter)
    tokenizer = load_tokenizer(model_dir)
    examples = load_instructions(options.eval_data, tokenizer=tokenizer)[: options.eval_examples]
    found = {
        "loss": answer_loss(model, tokenizer, examples, options.train["max_length"]),
        "exact": None,
    }
    marked = [e for e in examples if _MARKED.search(e.completion)]
    if marked and not options.no_exact:
        found["exact"] = _exact(model, tokenizer, marked, options.max_new_tokens)
    return found


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, examples: list[Example], length: int) -> float:
    rows = tokenize_examples(examples, tokenizer, length, SILENT)
    rows.sort(key=lambda row: len(row.input_ids))
    collate = PadCollator(tokenizer.pad_token_id or 0)
    total = count = 0
    for start in range(0, len(rows), 32):
        batch = {k: v.to(model.device) for k, v in collate(rows[start : start + 32]).items()}
        tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return round(total / count, 5)


@torch.no_grad()
def _exact(model: Any, tokenizer: Any, examples: list[Example], new_tokens: int) -> float:
    right = 0
    for start in range(0, len(examples), 100):
        part = examples[start : start + 100]
        batch = tokenizer(
            [e.prompt for e in part], return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        said = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(_result(e.completion) == _result(t) for e, t in zip(part, said, strict=True))
    return round(right / len(examples), 4)


def _result(text: str) -> str | None:
    found = _MARKED.search(text)
    return found[1].replace(",", "").rstrip(".") if found else None


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    settings = digest_of(
        {k: str(v) for k, v in vars(options).items() if k in _DECIDING}
        | {"align": options.align, "train": options.train}
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    rows = [row for row in rows if row["settings"] == settings]
    done = {row["cell"] for row in rows}
    todo = [cell for cell in cells(options) if digest_of(asdict(cell)) not in done]
    for number, cell in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {cell}", flush=True)
        record = {"settings": settings, "cell": digest_of(asdict(cell))}
        found = [{**record, **row} for row in measure(cell, options)]
        with file.open("a") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in found))
        rows += found
        for row in found:
            print(f"    {row['row']}: loss {row['loss']} exact {row['exact']}", flush=True)
    wanted = {digest_of(asdict(cell)) for cell in cells(options)}
    print(write_report([row for row in rows if row["cell"] in wanted], options.out))


_DECIDING = (
    "base", "text", "calibration", "train_data", "eval_data", "eval_examples", "keep_first",
    "keep_last", "max_new_tokens", "no_exact",
)  # fmt: skip


def _options() -> argparse.Namespace:
    demo = Path(str(resources.files("loram_cli.demo") / "base"))
    recipe = demo_recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", type=Path, default=demo, help="base model directory; default: the demo base")
    add("--text", default="demo:corpus", help="text to align on")
    add("--calibration", default="demo:calibration", help="text for stru's ranking")
    add("--train-data", default="demo:train")
    add("--eval-data", default="demo:validation")
    add("--eval-examples", type=int, default=100)
    add("--out", type=Path, default=Path("bench-quality"), help="results and work; resumable")
    add("--ratios", default="0.65,0.85")
    add("--seeds", default="1,2")
    add("--strategies", default="stru,rand,semi,unst")
    add(
        "--methods",
        default="none,pretrain,reconstruct,distill,reconstruct+pretrain,reconstruct+distill",
    )
    add("--keep-first", type=int, default=4)
    add("--keep-last", type=int, default=2)
    add("--align", default="{}", help="values of the align stage, as JSON")
    add("--train", default="{}", help="values of the train stage, as JSON")
    add("--max-new-tokens", type=int, default=110)
    add("--no-exact", action="store_true", help="held-out loss alone")
    add("--no-nf4", action="store_true", help="leave the 4-bit row out")
    add("--quick", action="store_true", help="one seed, stru, ratio 0.85, four methods")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.strategies, options.ratios = "1", "stru", "0.85"
        options.methods = "none,pretrain,reconstruct,reconstruct+pretrain"
    options.seeds = [int(word) for word in options.seeds.split(",")]
    options.ratios = [float(word) for word in options.ratios.split(",")]
    options.strategies = options.strategies.split(",")
    options.methods = parse_methods(options.methods)
    # Fewer steps than the recipe's, so that the ways are still apart.
    small = {"batch": 16, "micro_batch": 16, "steps": 30, "eval_steps": 30}
    section = {**recipe.section("align"), **small, **json.loads(options.align)}
    options.align = {k: v for k, v in section.items() if k not in ("data", "method")}
    small |= {"steps": 40, "eval_steps": 20}
    section = {**recipe.section("train"), **small, **json.loads(options.train)}
    options.train = {k: v for k, v in section.items() if k not in ("data", "eval_data")}
    return options


if __name__ == "__main__":
    main()
