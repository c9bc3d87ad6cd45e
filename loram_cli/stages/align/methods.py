"""What alignment may do, method by method: each reads a model directory and writes another."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.processes import is_main_process
from loram_cli.stages.core.lifecycle import check_free_disk
from loram_cli.stages.fit.run import finish_fit, fit_options

if TYPE_CHECKING:
    import torch

    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.modeling.layerwise.layer_fit import LayerFit
    from loram_cli.modeling.layerwise.states import BoundaryPool
    from loram_cli.modeling.layerwise.stream import LayerStream
    from loram_cli.stages.align.stage import AlignSpec
    from loram_cli.training.data.tokens import TokenRow


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """One method's work.

    Attributes:
        spec: How to align.
        source: The model directory to read.
        out: The directory to write into.
        base: The full model's directory; None where no method needs it.
        device: Where this process works.
        pruned_layers: Indices of the layers that are narrower than the base's.
        sparse: Whether pruning zeroed single weights, which must stay zero.
        train_rows: Packed text.
        eval_rows: Packed text held out.
    """

    spec: "AlignSpec"
    source: Path
    out: Path
    base: Path | None
    device: str
    pruned_layers: tuple[int, ...]
    sparse: bool
    train_rows: "list[TokenRow]"
    eval_rows: "list[TokenRow]"


def pretrain(work: Alignment, reporter: Reporter) -> dict[str, Any]:
    """Continue pre-training of all parameters (paper, section 3.3)."""
    return _fit(work, None, "Alignment of the pruned model", reporter)


def distill(work: Alignment, reporter: Reporter) -> dict[str, Any]:
    """Train all parameters towards the full model's next-token distribution."""
    import torch

    from loram_cli.modeling.load import load_causal_lm
    from loram_cli.training.loop.distill import Teaching
    from loram_cli.training.loop.options import resolve_precision

    assert work.base is not None
    bf16 = resolve_precision(work.spec.precision, work.device) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    teacher = load_causal_lm(work.base, dtype=dtype, device=work.device).requires_grad_(False)
    teaching = Teaching(teacher, work.spec.distill_temperature)
    return _fit(work, teaching, "Distillation into the pruned model", reporter)


def reconstruct(work: Alignment, reporter: Reporter) -> dict[str, Any]:
    """Fit each pruned layer to the full one, streaming; see :mod:`..modeling.layer_fit`.

    Layers that were fitted before an interruption are read back from ``fitted/``.
    """
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.modeling.layerwise.block_steps import BlockSteps
    from loram_cli.modeling.layerwise.layer_fit import Reconstruction, reconstruct_layers
    from loram_cli.modeling.layerwise.stream import LayerStream

    assert work.base is not None
    spec = work.spec
    folder = work.out / "fitted"
    folder.mkdir(exist_ok=True)
    index = CheckpointIndex.open(work.source)
    # The output, and the fitted tensors until it is written.
    check_free_disk(work.out, 2 * index.num_bytes)
    stored = next(iter(index.tensors.values())).dtype.to_torch()
    steps = BlockSteps(spec.block_steps, spec.block_learning_rate) if spec.block_steps else None
    how = Reconstruction(stored, spec.ridge, spec.targets, steps)
    windows = _windows(work, reporter)
    errors: dict[str, list[float]] = {}
    with (
        LayerStream(work.base, work.device) as full,
        LayerStream(work.source, work.device) as small,
    ):
        half = spec.calibration_memory_bytes // 2
        with (
            _pool(full, windows, half, work.out / "activations-full") as pool,
            _pool(small, windows, half, work.out / "activations-small") as small_pool,
        ):
            for i, fit in reconstruct_layers(
                full,
                small,
                windows,
                work.pruned_layers,
                lambda i: _read_fit(folder / f"{i}.safetensors"),
                (pool, small_pool),
                reporter,
                how,
            ):
                _write_fit(fit, folder / f"{i}.safetensors")
                errors[str(i)] = [round(fit.error_before, 5), round(fit.error_after, 5)]
    before = _held_out_loss(work, work.source, reporter)
    _write_checkpoint(work, folder, reporter)
    after = _held_out_loss(work, work.out, reporter)
    return {
        "tokens": windows.numel(),
        "layer_errors": errors,
        "eval_loss_before": before,
        "eval_loss_after": after,
    }


def _fit(work: Alignment, teaching: Any, title: str, reporter: Reporter) -> dict[str, Any]:
    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import CheckpointIndex, read_config
    from loram_cli.checkpoint.sources import copy_companions
    from loram_cli.training.loop.loop import fit_causal_text, save_causal_lm

    spec = work.spec
    model = _load_to_fit(work, reporter).train()
    config = read_config(work.source)
    family = family_for(config, str(work.source))
    masked = list(family.linear_names(config["num_hidden_layers"])) if work.sparse else []
    fitted = fit_causal_text(
        model,
        work.train_rows,
        work.eval_rows,
        fit_options(spec),
        work.out,
        reporter,
        train_lm_head=spec.train_lm_head,
        masked=masked,
        teaching=teaching,
    )
    losses = finish_fit(fitted, work.out, title)
    index = CheckpointIndex.open(work.source)
    zeros = _count_zeros(model, masked, index) if work.sparse else None
    stored = next(iter(index.tensors.values())).dtype.to_torch()
    if spec.fsdp:
        from loram_cli.modeling.sharding import write_whole

        write_whole(model, work.out, stored)
    elif is_main_process():
        save_causal_lm(model, work.out, dtype=stored)
    if is_main_process():
        shutil.copyfile(work.source / "config.json", work.out / "config.json")
        copy_companions(work.source, work.out)
    return {
        "steps": spec.steps,
        "tokens": spec.steps * spec.batch * spec.block_length,
        "trained_params": fitted.trainable_params,
        "zeros": zeros,
        **losses,
    }


def _load_to_fit(work: Alignment, reporter: Reporter) -> Any:
    import torch

    from loram_cli.modeling.load import load_causal_lm

    # Master weights in fp32: steps of 5e-5 vanish in bfloat16's eight bits.
    how = {"dtype": torch.float32, "device": work.device, "attention": work.spec.attention}
    if not work.spec.fsdp:
        return load_causal_lm(work.source, **how)
    from loram_cli.modeling.sharding import SharedModel

    shared = SharedModel(work.source, **how)
    shared.load(shared.model, reporter)
    return shared.model


def _count_zeros(model: Any, masked: list[str], index: "CheckpointIndex") -> int:
    """Zeros in the masked weights, after a check that each of the pruned model's is still one."""
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.modeling.sharding import whole
    from loram_cli.training.loop.masks import check_zeros

    parameters = dict(model.named_parameters())
    with TensorReader(index) as reader:
        return sum(check_zeros(n, reader.read(n), whole(parameters[n].detach())) for n in masked)


def _windows(work: Alignment, reporter: Reporter) -> "torch.Tensor":
    """Calibration windows drawn from the text, shape (samples, block_length)."""
    import random

    rows = work.train_rows
    count = min(work.spec.calibration_samples, len(rows))
    if count < work.spec.calibration_samples:
        reporter.warn(f"the text has only {count} windows to reconstruct on")
    return _stacked(random.Random(work.spec.seed).sample(rows, count))


def _stacked(rows: "list[TokenRow]") -> "torch.Tensor":
    import torch

    return torch.stack([torch.from_numpy(row.input_ids).long() for row in rows])


def _pool(
    stream: "LayerStream", windows: "torch.Tensor", memory_bytes: int, directory: Path
) -> "BoundaryPool":
    from loram_cli.modeling.layerwise.states import BoundaryPool

    shape = (*windows.shape, stream.hidden_size)
    return BoundaryPool(shape, stream.dtype, memory_bytes, directory)


def _held_out_loss(work: Alignment, model: Path, reporter: Reporter) -> float | None:
    from loram_cli.modeling.layerwise.loss import streamed_loss
    from loram_cli.modeling.layerwise.stream import LayerStream

    if not work.eval_rows:
        return None
    windows = _stacked(work.eval_rows)
    memory_bytes = work.spec.calibration_memory_bytes
    with (
        LayerStream(model, work.device) as stream,
        _pool(stream, windows, memory_bytes, work.out / "activations") as pool,
    ):
        return round(streamed_loss(stream, windows, pool, reporter), 4)


def _write_fit(fit: "LayerFit", file: Path) -> None:
    from safetensors.torch import save_file

    if file.is_file():
        return
    errors = json.dumps([fit.error_before, fit.error_after])
    partial = file.with_suffix(".partial")
    save_file(fit.weights, partial, metadata={"errors": errors})
    partial.rename(file)


def _read_fit(file: Path) -> "LayerFit | None":
    from safetensors import safe_open

    from loram_cli.modeling.layerwise.layer_fit import LayerFit

    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return LayerFit(weights, *json.loads(stored.metadata()["errors"]))


def _write_checkpoint(work: Alignment, folder: Path, reporter: Reporter) -> None:
    """The source's tensors, with the fitted ones in their places."""
    from safetensors import safe_open

    from loram_cli.checkpoint.header import read_header
    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.checkpoint.sources import copy_companions
    from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan

    index = CheckpointIndex.open(work.source)
    planned = {name: TensorPlan.like(entry) for name, entry in index.tensors.items()}
    fitted = {
        entry.name: entry.file
        for file in sorted(folder.glob("*.safetensors"))
        for entry in read_header(file)
    }
    if not set(fitted) <= set(planned):
        raise UsageError(f"{work.source}: its tensors are not those of the fitted layers")
    with (
        TensorReader(index, once=True) as reader,
        ShardedWriter(work.out, planned) as writer,
        reporter.progress("write", index.num_bytes / 2**20, "MiB") as progress,
    ):
        for name, entry in index.tensors.items():
            if name in fitted:
                with safe_open(fitted[name], framework="pt") as stored:
                    writer.write(name, stored.get_tensor(name))
            else:
                writer.write(name, reader.read(name))
            progress.advance(entry.num_bytes / 2**20)
    shutil.copyfile(work.source / "config.json", work.out / "config.json")
    copy_companions(work.source, work.out)


METHODS = {"reconstruct": reconstruct, "distill": distill, "pretrain": pretrain}
