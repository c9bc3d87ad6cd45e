"""Method ``reconstruct``: each pruned layer fitted to the full one's, with one layer in memory."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.whole import damage, mark_whole
from loram_cli.stages.align.methods.method import Alignment, Method, Needs
from loram_cli.stages.align.settings import AlignSettings
from loram_cli.stages.core.plan import check_free_disk
from loram_cli.stages.core.results import MethodResult

if TYPE_CHECKING:
    import torch

    from loram_cli.modeling.layerwise.block_steps import BlockSteps
    from loram_cli.modeling.layerwise.layer_fit import LayerFit
    from loram_cli.modeling.layerwise.states import BoundaryPool
    from loram_cli.modeling.layerwise.stream import LayerStream
    from loram_cli.training.data.tokens import TokenRow

_FIT = "fit.safetensors"
# On each layer of few bits, unless told.
_LOW_BIT_STEPS = 64


def reconstruct(work: Alignment, reporter: Reporter) -> MethodResult:
    """Fit each pruned layer to the full one, streaming; see :mod:`~.modeling.layerwise.layer_fit`.

    Layers that were fitted before an interruption are read back from ``fitted/``; a damaged one is
    fitted again.
    """
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.modeling.layerwise.block_steps import BlockSteps
    from loram_cli.modeling.layerwise.layer_fit import Reconstruction, reconstruct_layers
    from loram_cli.modeling.layerwise.low_bit_fit import LowBitFit, fit_low_bit_layers
    from loram_cli.modeling.layerwise.stream import LayerStream

    spec, source = work.spec, work.source
    folder = work.out / "fitted"
    folder.mkdir(exist_ok=True)
    # The output, and the fitted tensors until it is written.
    check_free_disk(work.out, 2 * source.num_bytes)
    stored = source.dtype.to_torch()
    steps = BlockSteps(spec.block_steps, spec.block_learning_rate) if spec.block_steps else None
    expert_steps = (
        BlockSteps(spec.expert_steps, spec.block_learning_rate) if spec.expert_steps else None
    )
    how = Reconstruction(stored, spec.ridge, spec.targets, steps, expert_steps)
    windows = _windows(work, reporter)
    errors: dict[str, tuple[float, ...]] = {}
    low_bit = source.low_bit
    half = spec.calibration_memory // 2
    with (
        LayerStream(work.full_model, work.device) as full,
        LayerStream(source, work.device) as small,
        _pool(full, windows, half, work.out / "activations-full") as pool,
        _pool(small, windows, half, work.out / "activations-small") as small_pool,
        ExitStack() as stack,
    ):
        known, pools = lambda i: _read_fit(folder / str(i)), (pool, small_pool)
        if low_bit is None:
            fits = reconstruct_layers(
                full, small, windows, work.pruned_layers, known, pools, reporter, how
            )
        else:
            packed = stack.enter_context(TensorReader(source.index)).read_packed
            fits = fit_low_bit_layers(
                full, small, windows, packed, known, pools, reporter,
                LowBitFit(low_bit, stored, _low_bit_steps(spec), spec.targets),
            )  # fmt: skip
        for i, fit in fits:
            _write_fit(fit, folder / str(i))
            # Digits, not decimals: a layer that changes little errs by little.
            errors[str(i)] = (
                float(f"{fit.error_before:.4g}"),
                float(f"{fit.error_after:.4g}"),
            )
    before = _held_out_loss(work, source, reporter)
    _write_checkpoint(work, folder, reporter)
    after = _held_out_loss(work, Model.open(work.out), reporter)
    return MethodResult(
        method=work.method,
        tokens=windows.numel(),
        layer_errors=errors,
        eval_loss_before=before,
        eval_loss_after=after,
    )


def _low_bit_steps(spec: AlignSettings) -> "BlockSteps":
    """Gradient steps on each layer of few bits, for which there is no closed form."""
    from loram_cli.modeling.layerwise.block_steps import BlockSteps

    count = spec.block_steps or _LOW_BIT_STEPS
    return BlockSteps(count, spec.block_learning_rate, each_token=True)


def _needs(spec: AlignSettings, model: Model, base: Model | None) -> Needs:
    """Fitted tensors until they are written; one layer of each model, and the sums."""
    assert base is not None
    layers = _largest_layer(base) + _largest_layer(model)
    fit_bytes = _equation_bytes(model)
    if model.family.experts is not None and (spec.block_steps or spec.expert_steps):
        # Masters, gradients and AdamW's two moments of the layer, in fp32.
        fit_bytes += 4 * 4 * (_largest_layer(model) // model.dtype.itemsize)
    return Needs(model.num_bytes, 2 * layers + fit_bytes)


def _largest_layer(model: Model) -> int:
    """Bytes of the largest decoder layer."""
    layers: dict[str, int] = {}
    prefix = f"{model.family.layers}."
    for name, entry in model.index.tensors.items():
        if name.startswith(prefix):
            layer = name[len(prefix) :].partition(".")[0]
            layers[layer] = layers.get(layer, 0) + entry.num_bytes
    return max(layers.values())


def _equation_bytes(model: Model) -> int:
    """Normal equations of the largest module: two square sums, and two of the weight's shape."""
    found = [
        entry.shape
        for name, entry in model.index.tensors.items()
        if (named := model.family.module_named(name.removesuffix(".weight"))) and named[1].columns
    ]
    return max(8 * 2 * columns * (columns + rows) for rows, columns in found)


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


def _held_out_loss(work: Alignment, model: Model, reporter: Reporter) -> float | None:
    from loram_cli.modeling.layerwise.loss import streamed_loss
    from loram_cli.modeling.layerwise.stream import LayerStream

    if not work.eval_rows:
        return None
    windows = _stacked(work.eval_rows)
    memory_bytes = work.spec.calibration_memory
    with (
        LayerStream(model, work.device) as stream,
        _pool(stream, windows, memory_bytes, work.out / "activations") as pool,
    ):
        return round(streamed_loss(stream, windows, pool, reporter), 4)


def _write_fit(fit: "LayerFit", folder: Path) -> None:
    from safetensors.torch import save_file

    if damage(folder) is None:
        return
    folder.mkdir(exist_ok=True)
    errors = json.dumps([fit.error_before, fit.error_after])
    save_file(fit.weights, folder / _FIT, metadata={"errors": errors})
    mark_whole(folder)


def _read_fit(folder: Path) -> "LayerFit | None":
    from safetensors import safe_open

    from loram_cli.modeling.layerwise.layer_fit import LayerFit

    if damage(folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with safe_open(folder / _FIT, framework="pt") as stored:
        weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return LayerFit(weights, *json.loads(stored.metadata()["errors"]))


def _write_checkpoint(work: Alignment, folder: Path, reporter: Reporter) -> None:
    """The source's tensors, with the fitted ones in their places."""
    from safetensors import safe_open

    from loram_cli.checkpoint.header import read_header
    from loram_cli.checkpoint.low_bit import PackedEntry
    from loram_cli.checkpoint.reader import TensorReader
    from loram_cli.checkpoint.sources import copy_companions
    from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan

    source, index = work.source.directory, work.source.index
    planned = {
        name: TensorPlan.like(entry.stored if isinstance(entry, PackedEntry) else entry)
        for name, entry in index.tensors.items()
    }
    fitted = {
        entry.name: entry.file
        for file in sorted(folder.glob(f"*/{_FIT}"))
        for entry in read_header(file)
    }
    if not set(fitted) <= set(planned):
        raise UsageError(f"{source}: its tensors are not those of the fitted layers")
    with (
        TensorReader(index, once=True) as reader,
        ShardedWriter(work.out, planned) as writer,
        reporter.progress("write", index.num_bytes / 2**20, "MiB") as progress,
    ):
        for name, entry in index.tensors.items():
            if name in fitted:
                with safe_open(fitted[name], framework="pt") as stored:
                    writer.write(name, stored.get_tensor(name).to(planned[name].dtype))
            elif isinstance(entry, PackedEntry):
                writer.write(name, reader.read_packed(name))
            else:
                writer.write(name, reader.read(name))
            progress.advance(entry.num_bytes / 2**20)
    shutil.copyfile(source / "config.json", work.out / "config.json")
    copy_companions(source, work.out)


METHOD = Method(
    act=reconstruct,
    needs=_needs,
    uses_base=True,
    fills_zeros=True,
    fits_layers=True,
    takes_steps=False,
)
