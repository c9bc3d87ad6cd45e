"""What a row does, in its process: each function measures one thing and returns its figures."""

import contextlib
import importlib.util
import io
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from .process import ROOT

# Steps and passes before the clock starts: kernels are chosen and memory pools grow.
_WARM = 2


class SkippedError(Exception):
    """The row cannot be measured here, and nothing is wrong."""


def train(**arguments: Any) -> dict[str, Any]:
    """Training steps of a preset's true shapes, beside the predicted peak: ``loram bench train``.

    Args:
        arguments: ``row``, and fields of ``BenchSpec``.
    """
    from dataclasses import asdict

    from loram_cli.tools.bench_worker import measure
    from loram_cli.tools.specs import BenchSpec

    spec = BenchSpec(rows=(arguments.pop("row"),), **arguments)
    _need("bitsandbytes", ":nf4" in spec.rows[0] or "8bit" in spec.optimizer)
    row = measure(spec)
    if row.failure:
        raise RuntimeError(row.failure)
    return {**asdict(row), "gradient_checkpointing": spec.gradient_checkpointing}


def fitted(
    preset: str, memory: str, measured: str | None = None, **arguments: Any
) -> dict[str, Any]:
    """:func:`train` in NF4 at the ratio that ``memory-report --fit`` names.

    Args:
        preset: The model.
        memory: That it is to fit.
        measured: Take the steps on this preset in its place.
        arguments: Fields of ``BenchSpec``.
    """
    told = _loram(
        "memory-report", "--preset", preset, "--gradient-checkpointing", "--micro-batch",
        str(arguments["micro_batch"]), "--length", str(arguments["length"]), "--cross-entropy",
        arguments["cross_entropy"], "--optimizer", arguments["optimizer"], "--multiple-of", "64",
        "--fit", memory, "--json",
    )  # fmt: skip
    (fit,) = [fit for fit in json.loads(told)["fits"] if fit["precision"] == "nf4"]
    if fit["ratio"] is None:
        raise RuntimeError(f"memory-report names no ratio at which {preset} fits {memory}")
    multiple = ":x64" if fit["ratio"] else ""
    row = f"{measured or preset}:{fit['ratio']:g}:nf4{multiple}"
    return train(row=row, **arguments)


def demo(quantize: str | None, folder: str, tiny: bool = False) -> dict[str, Any]:
    """The demo's recipe from end to end, through the command line.

    Args:
        quantize: ``nf4``, or None. NF4 takes the pruned and aligned model of the run before.
        folder: Where the run goes.
        tiny: A few steps of it.
    """
    import yaml

    _need("bitsandbytes", quantize is not None)
    recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    scored = all(map(importlib.util.find_spec, ("lm_eval", "datasets")))
    if not scored:
        recipe.pop("eval")
    recipe["train"] |= {"quantize": quantize} if quantize else {}
    recipe["full_lora"] = quantize is None
    if tiny:
        _make_tiny(recipe)
    name = f"demo-{quantize or 'bf16'}"
    file, run = Path(folder) / f"{name}.yaml", Path(folder) / name
    file.write_text(yaml.safe_dump(recipe))
    earlier = Path(folder) / "demo-bf16"
    if quantize and (earlier / "aligned").is_dir():
        for part in ("pruned", "aligned"):
            shutil.copytree(earlier / part, run / part)
    begun = time.monotonic()
    _loram("run", str(file), "--run", str(run), "--json")
    told = {"seconds": time.monotonic() - begun, **demo_figures(run)}
    return told if scored else {**told, "note": "not scored: lm-eval or datasets is not installed"}


def demo_figures(run: Path) -> dict[str, Any]:
    """Scores and training figures of a finished demo run.

    Args:
        run: Its directory.
    """
    training = json.loads((run / "adapter" / "loram.json").read_text())
    figures: dict[str, Any] = {
        "training_seconds": training["wall_seconds"],
        "training_bytes": training["peak_memory_increase_bytes"],
        "scores": {},
    }
    scored = run / "eval" / "loram.json"
    if scored.is_file():
        rows = json.loads(scored.read_text())["results"]["rows"]
        for label, row in rows.items():
            figures["scores"][label] = {
                f"{score['task']} {score['metric']}": score["value"] for score in row["scores"]
            }
    return figures


def offload(
    way: str, budget_bytes: int, rows: int, length: int, new_tokens: int, checkpoint: str
) -> dict[str, Any]:
    """Score and generate with a model that is whole, or partly read as it runs.

    Args:
        way: ``whole``; ``pageable`` copies layers on the computing stream, ``overlapped`` from
            pinned memory on one of their own.
        budget_bytes: For weights on the device.
        rows: Sequences at a time.
        length: Tokens of each that is scored.
        new_tokens: Generated per sequence.
        checkpoint: The model's directory.
    """
    import torch

    from loram_cli.evaluation.decode import Decoder, Generation
    from loram_cli.modeling.load import default_device, load_tokenizer

    device = default_device()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2000, (rows, length), generator=generator).to(device)
    begun = time.monotonic()
    with _model(way, Path(checkpoint), device, budget_bytes) as (model, stay):
        figures: dict[str, Any] = {"way": way, "layers_that_stay": stay}
        figures["load_seconds"] = _since(begun, device)
        seconds, sums = [], []
        with torch.inference_mode():
            # The first pass reads the layers from the disk.
            for _ in range(3):
                begun = time.monotonic()
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
                sums.append(float(logits.double().sum()))
                seconds.append(_since(begun, device))
        decoder = Decoder(model, load_tokenizer(Path(checkpoint)))
        prompts = ids[:, : min(32, length)].tolist()
        jobs = [Generation(prompt="", stops=(), max_new_tokens=new_tokens) for _ in prompts]
        passes: list[float] = []
        begun = time.monotonic()
        decoder.generate(prompts, jobs, lambda: passes.append(_since(begun, device)))
    # The first token's pass is that of the prompt.
    steps = [b - a for a, b in pairwise(passes)] or passes
    figures |= {
        "first_pass_seconds": seconds[0],
        "scored_tokens_per_second": ids.numel() / statistics.median(seconds[1:]),
        "generated_tokens_per_second": rows / statistics.median(steps),
        "logits_sum": sums[-1],
    }
    if device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures


@contextlib.contextmanager
def _model(way: str, checkpoint: Path, device: str, budget_bytes: int) -> Iterator[tuple[Any, int]]:
    import torch

    from loram_cli.modeling.copies import Copies, CudaCopies
    from loram_cli.modeling.free_memory import free_memory_bytes
    from loram_cli.modeling.load import load_causal_lm
    from loram_cli.modeling.offload import loaded_within, resident_layers
    from loram_cli.modeling.skeleton import SkeletonModel
    from loram_cli.reporting import NullReporter

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if way == "whole":
        model = load_causal_lm(checkpoint, dtype=dtype, device=device)
        yield model, model.config.num_hidden_layers
        return
    skeleton = SkeletonModel(checkpoint, dtype=dtype, device=device)
    stay = resident_layers(skeleton, budget_bytes)
    copies: Copies | None = None
    if way == "overlapped":
        copies = CudaCopies(device) if device == "cuda" else _stand_in()
    # As eval and generate do: half of the machine's free memory may hold the others.
    host_bytes = free_memory_bytes("cpu") // 2
    with loaded_within(skeleton, stay, NullReporter(), host_bytes=host_bytes, copies=copies):
        yield skeleton.model, stay
    broken = getattr(copies, "broken", None)
    if broken:
        raise RuntimeError(f"copies out of order: {broken[0]}")


def stream(
    batch: int, micro_batch: int, length: int, steps: int, full_layers: int, checkpoint: str
) -> dict[str, Any]:
    """Training steps in NF4 whose layers come from pinned memory, beside what they cannot beat.

    The floor is the longer of what the bus takes to copy the layers of a step, at the bandwidth
    that a pinned copy reaches here, and what the same step takes with every layer on the device.

    Args:
        batch: Examples of a step.
        micro_batch: Examples of a forward pass.
        length: Tokens of each.
        steps: That are timed.
        full_layers: Of the whole model, for which the floor and the same share above it are told.
        checkpoint: A model with some of its layers.
    """
    _need("bitsandbytes", True)
    import torch

    from loram_cli.modeling.load import default_device

    device = default_device()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2000, (batch, length), generator=generator).to(device)
    figures: dict[str, Any] = {"batch": batch, "length": length}
    for way in ("resident", "streamed"):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        told = _streamed_steps(Path(checkpoint), device, ids.split(micro_batch), steps, way)
        figures |= {f"{way}_{name}": figure for name, figure in told.items()}
        if device == "cuda":
            figures[f"{way}_peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
    off = max(
        abs(one / other - 1)
        for step in zip(figures["resident_losses"], figures["streamed_losses"], strict=True)
        for one, other in zip(*step, strict=True)
    )
    # A GPU adds up gradients in no fixed order.
    if off > (1e-3 if device == "cuda" else 0):
        raise RuntimeError(f"the losses are {off:.1e} away from the resident model's")
    layers, moved = figures["streamed_layers"], figures["streamed_moved_bytes"]
    bandwidth = _bus_bandwidth(device, figures["streamed_layer_bytes"])
    computing, copying = figures["resident_step_seconds"], moved / bandwidth
    over = figures["streamed_step_seconds"] / max(computing, copying)
    # Of the whole model each layer but the two at either end comes twice a step as well.
    all_copying = 2 * (full_layers - 2) * figures["streamed_layer_bytes"] / bandwidth
    all_seconds = over * max(computing * full_layers / layers, all_copying)
    return {
        **figures,
        "bus_bytes_per_second": bandwidth,
        "floor_seconds": max(computing, copying),
        "bus_decides": copying > computing,
        "over_floor": over,
        "full_layers": full_layers,
        "full_step_seconds": all_seconds,
        "full_tokens_per_second": ids.numel() / all_seconds,
    }


def _streamed_steps(
    checkpoint: Path, device: str, ids: Any, steps: int, way: str
) -> dict[str, Any]:
    import torch

    from loram_cli.modeling.copies import Copies, CudaCopies
    from loram_cli.modeling.free_memory import free_memory_bytes
    from loram_cli.modeling.layerwise.lora_pass import streamed_lora
    from loram_cli.modeling.skeleton import SkeletonModel
    from loram_cli.reporting import NullReporter
    from loram_cli.training.adapters import attach_lora, lora_config

    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    skeleton = SkeletonModel(checkpoint, dtype=dtype, device=device, nf4=True)
    lora = lora_config(list(skeleton.model.family.lora_targets), dropout=0.0)
    model = attach_lora(skeleton.model, lora, seed=0)
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    batches = [{"input_ids": some, "labels": some} for some in ids]
    items = sum(some.numel() - len(some) for some in ids)
    layer_bytes = [sum(slot.num_bytes for slot in slots) for _, slots in skeleton.layers()]
    copies: Copies = CudaCopies(device) if on_gpu else _stand_in()
    stay = len(layer_bytes) if way == "resident" else 0
    host_bytes = free_memory_bytes("cpu") // 2
    seconds, losses, moved = [], [], 0
    with streamed_lora(
        skeleton, model, NullReporter(), stay=stay, host_bytes=host_bytes, copies=copies
    ) as passes:
        for _ in range(_WARM + steps):
            before, begun = passes.source.loaded_bytes, time.monotonic()
            told = passes.accumulate(
                batches,
                items,
                autocast=lambda: torch.autocast(device, torch.bfloat16, enabled=on_gpu),
            )
            optimizer.step()
            optimizer.zero_grad()
            losses.append([float(loss) for loss in told])
            seconds.append(_since(begun, device))
            moved = passes.source.loaded_bytes - before
    broken = getattr(copies, "broken", None)
    if broken:
        raise RuntimeError(f"copies out of order: {broken[0]}")
    return {
        "layers": len(layer_bytes), "layer_bytes": max(layer_bytes), "moved_bytes": moved,
        "step_seconds": statistics.median(seconds[_WARM:]), "losses": losses,
    }  # fmt: skip


def _bus_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes a second that a copy of so many from pinned memory reaches."""
    import torch

    on_gpu = device == "cuda"
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    found = []
    for _ in range(_WARM + 3):
        _since(0.0, device)
        begun = time.monotonic()
        there.copy_(host, non_blocking=True)
        found.append(num_bytes / _since(begun, device))
    return max(found)


def _stand_in() -> Any:
    from helpers.fake_copies import FakeCopies

    return FakeCopies()


def peer(
    way: str,
    row: str,
    micro_batch: int,
    length: int,
    steps: int,
    cross_entropy: str,
    device: str | None = None,
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """The same weights, batch and steps through other tools.

    Args:
        way: ``trainer`` and ``trainer-checkpointing`` are plain PEFT under transformers' Trainer;
            ``trl`` is SFTTrainer with gradient checkpointing and, on a GPU, activations offloaded.
        row: The model.
        micro_batch: Sequences per step.
        length: Tokens of each.
        steps: That are timed.
        cross_entropy: Of our rows; peers have their own.
        device: None takes a GPU when there is one.
        optimizer: Of our rows; peers use AdamW.
    """
    for library in ("trl", "datasets") if way == "trl" else ():
        _need(library, True)
    import peft
    import torch

    from loram_cli.arch.registry import family_for
    from loram_cli.arch.targets import lora_targets
    from loram_cli.modeling.load import default_device
    from loram_cli.modeling.random_model import random_causal_lm
    from loram_cli.runs.meter import Meter
    from loram_cli.tools.specs import BenchModel

    device = device or default_device()
    on_gpu = device == "cuda"
    config = BenchModel.parse(row).config()
    family = family_for(config, row)
    if on_gpu:
        torch.cuda.init()
    meter = Meter()
    model = random_causal_lm(
        family, config, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device, seed=0
    )
    # SFTTrainer refuses an adapter on the head, which its memory savers compute past.
    tied = way == "trl"
    targets = list(lora_targets(family, tied_embeddings=tied))
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets
    )
    clock: list[float] = []
    ids = torch.randint(
        3, config["vocab_size"], ((steps + _WARM) * micro_batch, length),
        generator=torch.Generator().manual_seed(0),
    ).tolist()  # fmt: skip
    trainer = _peer_trainer(way, model, lora, ids, clock, micro_batch, steps + _WARM, on_gpu)
    trainer.train()
    peak = meter.stop()
    seconds = statistics.median([b - a for a, b in pairwise(clock)][_WARM - 1 :])
    return {
        "way": way,
        "measured_bytes": peak.peak_memory_bytes if on_gpu else peak.peak_memory_increase_bytes,
        "seconds_per_step": seconds,
        "samples_per_second": micro_batch / seconds,
    }


def _peer_trainer(
    way: str, model: Any, lora: Any, ids: list[list[int]], clock: list[float], micro_batch: int,
    steps: int, on_gpu: bool,
) -> Any:  # fmt: skip
    import tempfile
    from dataclasses import fields

    import peft
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.monotonic())

    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": steps, "learning_rate": 1e-5,
        "per_device_train_batch_size": micro_batch, "optim": "adamw_torch_fused", "bf16": on_gpu,
        "use_cpu": not on_gpu, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip

    def checkpointing(arguments_class: type, enabled: bool) -> dict[str, Any]:
        # The name before transformers 5.23, and the one since.
        known = {field.name for field in fields(arguments_class)}
        new = "activation_checkpointing"
        name = new if new in known else "gradient_checkpointing"
        return {name: enabled, f"{name}_kwargs": {"use_reentrant": False}}

    if way != "trl":
        enabled = way == "trainer-checkpointing"
        data = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
        arguments = TrainingArguments(**settings, **checkpointing(TrainingArguments, enabled))
        peft_model = peft.get_peft_model(model, lora)
        return Trainer(model=peft_model, args=arguments, train_dataset=data, callbacks=[Clock()])
    import datasets
    from trl import SFTConfig, SFTTrainer

    from loram_cli.modeling.load import load_tokenizer

    arguments = SFTConfig(
        **settings, **checkpointing(SFTConfig, True), max_length=len(ids[0]),
        activation_offloading=on_gpu,
    )  # fmt: skip
    return SFTTrainer(
        model=peft.get_peft_model(model, lora),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
        processing_class=load_tokenizer(ROOT / "loram_cli" / "demo" / "base"),
        callbacks=[Clock()],
    )


def taylor(ratio: float, samples: int, length: int, checkpoint: str, folder: str) -> dict[str, Any]:
    """``prune --strategy stru``, by first-order Taylor importance.

    Args:
        ratio: Of each pruned layer.
        samples: Calibration windows.
        length: Tokens of each.
        checkpoint: The base.
        folder: Where the pruned model goes, and is deleted again.
    """
    out = Path(folder) / "taylor"
    _loram(
        "prune", "--model", checkpoint, "--strategy", "stru", "--importance", "taylor", "--ratio",
        str(ratio), "--multiple-of", "8", "--calibration", "demo:corpus", "--calibration-samples",
        str(samples), "--calibration-length", str(length), "--out", str(out), "--json",
    )  # fmt: skip
    told = json.loads((out / "loram.json").read_text())
    layers = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    shutil.rmtree(out)
    return {
        "layers": layers,
        "seconds": told["wall_seconds"],
        "seconds_per_layer": told["wall_seconds"] / layers,
        "peak_bytes": told["peak_memory_bytes"],
    }


def reconstruct(
    ratio: float, samples: int, length: int, checkpoint: str, folder: str
) -> dict[str, Any]:
    """Fit every pruned layer in closed form; the first and the last layer stay whole.

    Args:
        ratio: Of each pruned layer.
        samples: Windows of random tokens.
        length: Tokens of each.
        checkpoint: The base.
        folder: Where the pruned model goes, and is deleted again.
    """
    import torch

    from loram_cli.modeling.layerwise.layer_fit import Reconstruction, reconstruct_layers
    from loram_cli.modeling.layerwise.states import BoundaryPool
    from loram_cli.modeling.layerwise.stream import LayerStream
    from loram_cli.modeling.load import default_device
    from loram_cli.reporting import NullReporter

    base, out = Path(checkpoint), Path(folder) / "reconstruct"
    _loram(
        "prune", "--model", checkpoint, "--strategy", "rand", "--ratio", str(ratio),
        "--multiple-of", "8", "--keep-first", "1", "--keep-last", "1", "--out", str(out), "--json",
    )  # fmt: skip
    device = default_device()
    windows = torch.randint(3, 2000, (samples, length), generator=torch.Generator().manual_seed(0))
    seconds, errors = [], []
    with LayerStream(base, device) as full, LayerStream(out, device) as small:
        shape = (samples, length, full.hidden_size)
        pruned = range(1, full.num_layers - 1)
        how = Reconstruction(torch.bfloat16, ridge=0.01)
        with (
            BoundaryPool(shape, full.dtype, 8 * 2**30, out / "full") as whole,
            BoundaryPool(shape, full.dtype, 8 * 2**30, out / "small") as narrow,
        ):
            begun = time.monotonic()
            fits = reconstruct_layers(
                full, small, windows, pruned, lambda _: None, (whole, narrow), NullReporter(), how
            )
            for _, fit in fits:
                seconds.append(_since(begun, device))
                errors.append([fit.error_before, fit.error_after])
                begun = time.monotonic()
    shutil.rmtree(out)
    figures = {"layers": len(seconds), "errors": errors, "tokens": samples * length}
    # The first one has the embedding and the layers before it in its time.
    figures["seconds_per_layer"] = statistics.median(seconds[1:] or seconds)
    if device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def _make_tiny(recipe: dict[str, Any]) -> None:
    recipe["prune"] = {"strategy": "rand", "ratio": 0.85}
    recipe["align"] = {"data": "demo:corpus", "block_length": 32, "steps": 1, "batch": 2,
                       "micro_batch": 2, "warmup_steps": 0}  # fmt: skip
    recipe["train"] |= {"steps": 1, "batch": 2, "micro_batch": 2, "warmup_steps": 0}
    recipe["train"].pop("eval_data")
    recipe["full_lora"] = False
    if "eval" in recipe:
        recipe["eval"] |= {"limit": 2, "max_new_tokens": 2, "tasks": ["perplexity"]}


def _loram(*words: str) -> str:
    """What a command prints."""
    from loram_cli.cli.app import run_command

    told, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
        code = run_command(list(words))
    if code:
        last = said.getvalue().strip().splitlines()[-3:]
        raise RuntimeError(f"loram {words[0]}: exit {code}: {' '.join(last)}")
    return told.getvalue()


def _need(library: str, needed: bool) -> None:
    if needed and importlib.util.find_spec(library) is None:
        raise SkippedError(f"{library} is not installed (gather_wheels.py brings it along)")


def _since(begun: float, device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.monotonic() - begun


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "demo": demo,
    "train": train,
    "fitted": fitted,
    "offload": offload,
    "stream": stream,
    "peer": peer,
    "taylor": taylor,
    "reconstruct": reconstruct,
}
