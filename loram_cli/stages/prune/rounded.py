"""Round every decoder linear to few bits (``lowbit``); shapes stay."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import Codes, dequantize, pack
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.memory.account import BF16_BYTES
from loram_cli.modeling.layerwise.output_gradients import OutputGradients
from loram_cli.modeling.layerwise.sparsegpt_pass import changed_layers
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.pruning.rounding import (
    round_nearest,
    round_on_both_sides,
    round_with_feedback,
)
from loram_cli.pruning.sparsegpt import Hessian
from loram_cli.reporting import Reporter
from loram_cli.stages.core.results import PruneResult
from loram_cli.stages.prune.calibration import load_windows, open_pool
from loram_cli.stages.prune.plan import PruneWork
from loram_cli.stages.prune.rewrite import Changes, write_linears_changed
from loram_cli.stages.prune.spec import PruneSpec


@dataclass(frozen=True)
class _Row:
    """One rounded weight: bytes, parameters, and the squares of its error and of itself."""

    packed: torch.Tensor
    params: int
    error: float
    norm: float


def write_rounded(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> tuple[PruneResult, dict[str, str]]:
    """Write the model with its decoder linears rounded, and nothing else changed.

    Returns:
        The plan's figures with what was measured, and the digests of the shards.

    Raises:
        LoramError: NaN weights, unusable calibration text, or a Hessian that has no inverse.
    """
    error = norm = 0.0
    params = linear_bytes = 0

    def take(row: _Row) -> torch.Tensor:
        nonlocal error, norm, params, linear_bytes
        error, norm = error + row.error, norm + row.norm
        params += row.params
        linear_bytes += row.packed.nbytes
        return row.packed

    digests = write_linears_changed(
        spec,
        work,
        directory,
        lambda reader: _rounded_weights(spec, work, reader, directory, reporter),
        take,
    )
    measured = replace(
        work.result(),
        decoder_linear_params=params,
        linear_bytes=linear_bytes,
        linear_share=round(linear_bytes / (BF16_BYTES * params), 5),
        rounding_error=round(error / norm, 6) if norm else 0.0,
    )
    return measured, digests


def _rounded_weights(
    spec: PruneSpec,
    work: PruneWork,
    reader: TensorReader,
    directory: Path,
    reporter: Reporter,
) -> Changes[_Row]:
    """Rounded weights by name, in the order of the layers."""
    if spec.method == "nearest":
        return _by_nearest(work, reader, reporter)
    return _by_feedback(spec, work, directory, reporter)


def _by_nearest(work: PruneWork, reader: TensorReader, reporter: Reporter) -> Changes[_Row]:
    assert work.low_bit is not None
    names = work.model.linear_names
    with reporter.progress("round", len(names), "tensor") as progress:
        for name in names:
            weight = reader.read(name)
            yield {name: _row(weight, round_nearest(weight, work.low_bit), work.low_bit)[0]}
            progress.advance()


def _by_feedback(
    spec: PruneSpec, work: PruneWork, directory: Path, reporter: Reporter
) -> Changes[_Row]:
    assert work.low_bit is not None and work.calibration is not None
    low_bit, needs = work.low_bit, work.calibration
    rows: dict[str, _Row] = {}
    windows = load_windows(spec, needs)
    modules = [module.name for module in work.model.family.modules]
    with OutputGradients(directory / "gradients") as gradients:
        if needs.gradients is not None:
            with (
                LayerStream(work.model, spec.device) as stream,
                open_pool(spec, needs.gradients, stream, directory) as pool,
            ):
                part = windows[: needs.gradients.samples]
                gradients.collect(stream, part, modules, pool, reporter)

        def change(weights: dict[str, torch.Tensor], hessian: Hessian) -> dict[str, torch.Tensor]:
            changed = {}
            for name, weight in weights.items():
                how = (low_bit, spec.dampening, name, spec.block_columns)
                if needs.gradients is None:
                    codes = round_with_feedback(weight, hessian, *how)
                else:
                    codes = round_on_both_sides(weight, hessian, gradients.take(name), *how)
                rows[name], changed[name] = _row(weight, codes, low_bit)
            return changed

        with (
            LayerStream(work.model, spec.device) as stream,
            open_pool(spec, needs, stream, directory) as pool,
        ):
            for changed in changed_layers(stream, windows, modules, change, pool, reporter):
                yield {name: rows.pop(name) for name in changed}


def _row(weight: torch.Tensor, codes: Codes, low_bit: LowBit) -> tuple[_Row, torch.Tensor]:
    """A rounded weight as it is written, and as it is computed with."""
    dense = dequantize(codes, low_bit, weight.shape[1], weight.dtype)
    whole = weight.float()
    error = float((dense.float() - whole).square().sum())
    row = _Row(pack(codes, low_bit).cpu(), weight.numel(), error, float(whole.square().sum()))
    return row, dense
