"""One row of the bench: its commands, and what is read from their manifests."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gain.rows import FULL, Flags, Row
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.schema import digest_of

Figures = dict[str, Any]

# Exact steps on the full model: fewer, and at a lower rate than the training before them.
_POLISH_RATE = "2e-4"
_SCALED = ("--fit-scale",)
_TEXT_WINDOWS = 16


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows share.

    Attributes:
        model: The base.
        out: Results and work.
        train_data: Instructions to train on.
        eval_data: Held-out instructions.
        text: General text to align on.
        text_eval: General text that is held out.
        eval_examples: Answers that are scored.
        block_length: Tokens of a window of text.
        train: Flags of every training; scoring computes in their ``--precision``.
    """

    model: Path
    out: Path
    train_data: str
    eval_data: str
    text: str
    text_eval: Path
    eval_examples: int
    block_length: int
    train: Flags

    def deciding(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {k: str(v) for k, v in asdict(self).items() if k != "out"}

    def filled(self, flags: Flags) -> Flags:
        """Flags with the bench's data in place of its names."""
        data = {
            "precision": self.flag("--precision"),
            "text": self.text,
            "train": self.train_data,
            "mixed": f"{self.text}:0.5,{self.train_data}:0.5",
        }
        return tuple(flag.format(**data) for flag in flags)

    def flag(self, name: str) -> str:
        """The value of one of the training's flags."""
        return self.train[self.train.index(name) + 1]


@dataclass(frozen=True)
class _Done:
    """An output of a command, and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def seconds(self) -> float:
        return round(self.manifest.wall_seconds, 1)


def measure(row: Row, seed: int, bench: Bench) -> Figures:
    """Run a row's commands, and score what comes out."""
    small, figures = _small_model(row, seed, bench)
    train = ("--in", str(small), *_training(bench, seed), *row.train)
    figures |= {"bytes": round(_held_share(bench.model, small, row.train), 4)}
    figures |= {"predicted_peak_bytes": _predicted(train, bench)}
    trained = _made("train", train, bench)
    results = trained.manifest.results
    figures |= {
        "train_seconds": trained.seconds,
        "train_peak_bytes": trained.manifest.peak_memory_increase_bytes,
        "loss_before": results["eval_loss_before"],
        "loss_small": results["eval_loss_after"],
    }
    if row.name == FULL:
        figures |= _scores(bench, "base", ())
        return figures | _scores(bench, "recovered", (trained.path,))
    return figures | _scores(bench, "recovered", (_recovered(trained, bench).path,))


def measure_scaled(row: Row, seed: int, bench: Bench) -> Figures:
    """A row's recovery once more, with its update scaled to the full model."""
    small, _ = _small_model(row, seed, bench)
    train = ("--in", str(small), *_training(bench, seed), *row.train)
    done = _recovered(_made("train", train, bench), bench, _SCALED)
    scale = {"scale": done.manifest.results["scale"], "scale_seconds": done.seconds}
    return scale | _scores(bench, "scaled", (done.path,))


def measure_polished(row: Row, seed: int, bench: Bench, steps: int) -> Figures:
    """Exact steps on the full model after a row's recovery; of full LoRA's row, these alone."""
    start = None
    if row.name != FULL:
        small, _ = _small_model(row, seed, bench)
        train = ("--in", str(small), *_training(bench, seed), *row.train)
        flags = _SCALED if row.scaled else ()
        start = _recovered(_made("train", train, bench), bench, flags).path
    polished = _made("train", _polish(bench, seed, steps, start), bench)
    return _scores(bench, f"polished_{steps}", (polished.path,))


def _small_model(row: Row, seed: int, bench: Bench) -> tuple[Path, Figures]:
    """A row's small model, and what making it took."""
    small, figures = bench.model, Figures()
    stages = [("prune", row.prune), ("align", row.align), *row.then]
    for stage, flags in stages:
        if flags is None:
            continue
        done = _made(stage, _stage_flags(stage, small, bench.filled(flags), seed, bench), bench)
        small = done.path
        spent = figures.get(f"{stage}_seconds", 0.0)
        figures[f"{stage}_seconds"] = round(spent + done.seconds, 1)
        if stage == "align":
            tokens = figures.get("align_tokens", 0) + done.manifest.results["tokens"]
            figures["align_tokens"] = tokens
    return small, figures


def _stage_flags(stage: str, small: Path, flags: Flags, seed: int, bench: Bench) -> Flags:
    """Flags of a stage that goes on from a small model; the first one prunes the base."""
    begun = ("--in", str(small)) if small != bench.model else ()
    if stage == "prune":
        return (*begun, "--model", str(bench.model), *flags, "--seed", str(seed))
    return (*begun, *flags, "--seed", str(seed), "--block-length", str(bench.block_length))


def _recovered(trained: _Done, bench: Bench, flags: Flags = ()) -> _Done:
    places = ("--in", str(trained.path), "--model", str(bench.model))
    return _made("recover", (*places, *flags), bench)


def _training(bench: Bench, seed: int) -> Flags:
    return (
        "--data", bench.train_data, "--eval-data", bench.eval_data,
        "--eval-examples", str(bench.eval_examples), "--eval-steps", "100000",
        "--seed", str(seed), *bench.train,
    )  # fmt: skip


def _polish(bench: Bench, seed: int, steps: int, start: Path | None = None) -> Flags:
    """Further steps on other batches than those of the training: another seed draws them."""
    begun = ("--from-adapter", str(start)) if start else ()
    return (
        "--in", str(bench.model), *_training(bench, seed + 1000), *begun,
        "--steps", str(steps), "--learning-rate", _POLISH_RATE, "--warmup-steps", "0",
        "--eval-examples", "1",
    )  # fmt: skip


def _made(stage: str, flags: Flags, bench: Bench) -> _Done:
    """The output of a command; made where it is not there yet, under a name from its flags."""
    out = bench.out / "work" / f"{stage}-{digest_of(list(flags))[-10:]}"
    if not (out / MANIFEST_NAME).is_file():
        _loram(stage, *flags, "--out", str(out), bench=bench)
    return _Done(out, Manifest.read(out))


def _predicted(train: Flags, bench: Bench) -> int:
    out = str(bench.out / "work" / "none")
    said = _loram("train", *train, "--out", out, "--dry-run", "--json", bench=bench)
    return int(json.loads(said)["plans"][0]["memory_bytes"])


def _loram(*words: str, bench: Bench) -> str:
    """Run a command of the product; its errors end the bench, and what is done stays."""
    command = [sys.executable, "-m", "loram_cli", *words, "--run", str(bench.out / "work" / "run")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed ({done.returncode}): {' '.join(command)}")
    return done.stdout


def _held_share(base: Path, small: Path, train: Flags) -> float:
    """Bytes of the frozen decoder layers that are trained on, against the base's in bf16."""
    return held_bytes(small, "nf4" in train) / held_bytes(base)


def held_bytes(directory: Path, nf4: bool = False) -> int:
    """Bytes of a model's decoder layers as training holds them."""
    from loram_cli.checkpoint.low_bit import PackedEntry
    from loram_cli.checkpoint.model import Model
    from loram_cli.memory.account import BF16_BYTES, nf4_tensor_bytes

    model = Model.open(directory)
    linears = set(model.linear_names)
    total = 0
    for name, entry in model.index.tensors.items():
        if name.startswith(f"{model.family.layers}."):
            params = math.prod(entry.shape)
            if isinstance(entry, PackedEntry):
                total += entry.num_bytes
            elif nf4 and name in linears:
                total += nf4_tensor_bytes(params)
            else:
                total += BF16_BYTES * params
    return total


def _scores(bench: Bench, name: str, adapters: tuple[Path, ...]) -> Figures:
    """Loss a token on held-out answers, and perplexity of general text, of the full model."""
    import torch

    from loram_cli.modeling.load import load_causal_lm, load_tokenizer
    from loram_cli.training.adapters import load_adapter

    dtype = torch.float32 if bench.flag("--precision") == "fp32" else torch.bfloat16
    model = load_causal_lm(bench.model, dtype=dtype)
    for adapter in adapters:
        model = load_adapter(model, adapter)
    tokenizer = load_tokenizer(bench.model)
    loss = _answer_loss(model, tokenizer, bench)
    text = _text_loss(model, tokenizer, bench)
    return {f"loss_{name}": round(loss, 4), f"ppl_{name}": round(math.exp(text), 3)}


def _answer_loss(model: Any, tokenizer: Any, bench: Bench) -> float:
    from loram_cli.reporting import NullReporter
    from loram_cli.training.data.documents import load_instructions
    from loram_cli.training.data.tokens import tokenize_examples
    from loram_cli.training.loop.mean_loss import mean_loss

    examples = load_instructions(bench.eval_data, tokenizer=tokenizer)[: bench.eval_examples]
    rows = tokenize_examples(examples, tokenizer, int(bench.flag("--max-length")), NullReporter())
    return mean_loss(model, rows)


def _text_loss(model: Any, tokenizer: Any, bench: Bench) -> float:
    from loram_cli.training.data.documents import load_text
    from loram_cli.training.data.tokens import pack_tokens
    from loram_cli.training.loop.mean_loss import mean_loss

    rows = pack_tokens(load_text(str(bench.text_eval)), tokenizer, bench.block_length)
    return mean_loss(model, rows[:_TEXT_WINDOWS])
