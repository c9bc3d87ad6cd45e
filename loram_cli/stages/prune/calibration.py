"""What calibrated pruning reads and holds: windows of text, and hidden states between layers."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.memory.account import BF16_BYTES, FP32_BYTES
from loram_cli.modeling.layerwise.gradients import boundaries_kept
from loram_cli.modeling.layerwise.output_gradients import kept_params
from loram_cli.modeling.layerwise.states import BoundaryPool, computed_dtype
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.load import default_device, load_tokenizer
from loram_cli.pruning.calibrate import calibration_windows
from loram_cli.pruning.sparsegpt import hessian_bytes
from loram_cli.stages.core.results import CalibrationFigures
from loram_cli.stages.prune.spec import CALIBRATED, EXPERTS_CALIBRATED, PruneSpec
from loram_cli.training.data.documents import load_text
from loram_cli.training.data.sources import data_files

# Windows and tokens a window: LLM-Pruner's and SparseGPT's own defaults; fewer than GPTQ's 128 of
# 2048: twice as many tokens as the widest linear of a 13B model has inputs.
_DEFAULT_WINDOWS = {
    "taylor": (10, 128),
    "sparsegpt": (128, 2048),
    "gptq": (64, 384),
    "yaqa": (64, 384),
}
_BY_HESSIAN = ("sparsegpt", "wanda", "obs", "svd", "gptq", "yaqa")
_OTHER_WINDOWS = (32, 512)
# Tokens of the windows that "yaqa" takes gradients on: more tell little more.
_GRADIENT_TOKENS = 16384
# A router spreads tokens over all experts: each must have seen some hundred.
_EXPERT_WINDOWS = (128, 512)


@dataclass(frozen=True)
class CalibrationNeeds:
    """What calibration will hold beside one decoder layer.

    Attributes:
        samples: Windows of text.
        length: Tokens per window.
        boundaries: Layer boundaries whose hidden states are kept at a time.
        boundary_bytes: Hidden states of one boundary.
        memory_bytes: How much of them stays in memory.
        disk_bytes: How much of them goes to the output's disk meanwhile.
        hessian_bytes: What SparseGPT's Hessians of one layer, and their inverses, take.
        gradients: What a pass before that one holds, forward and backward over some of the
            windows; None where there is none.
    """

    samples: int
    length: int
    boundaries: int
    boundary_bytes: int
    memory_bytes: int
    disk_bytes: int
    hessian_bytes: int = 0
    gradients: "CalibrationNeeds | None" = None

    @property
    def held_bytes(self) -> int:
        """Memory beside one decoder layer: hidden states and Hessians."""
        return self.memory_bytes + self.hessian_bytes

    def figures(self) -> CalibrationFigures:
        """As the manifest records them."""
        return CalibrationFigures(
            samples=self.samples,
            length=self.length,
            activation_memory_bytes=self.memory_bytes,
            activation_disk_bytes=self.disk_bytes,
            hessian_memory_bytes=self.hessian_bytes,
        )


def calibration_needs(
    spec: PruneSpec, model: Model, method: str | None, *, of_experts: bool = False
) -> CalibrationNeeds | None:
    """Windows and activation storage, before any text or weight is read.

    Args:
        spec: The pruning.
        model: The base.
        method: How what goes is ranked.
        of_experts: Whether experts are ranked.

    Returns:
        None where the method reads no text.

    Raises:
        LoramError: The text is a local path with nothing usable there.
        UsageError: A window is longer than the model's context.
    """
    if method is None or method not in (*CALIBRATED, *EXPERTS_CALIBRATED):
        return None
    assert spec.calibration is not None
    data_files(spec.calibration)
    config = model.config
    samples, length = _DEFAULT_WINDOWS.get(method, _OTHER_WINDOWS)
    if of_experts:
        samples, length = _EXPERT_WINDOWS
    positions = config.get("max_position_embeddings") or length
    samples = spec.calibration_samples or samples
    if spec.calibration_length is not None and spec.calibration_length > positions:
        raise UsageError(
            f"--calibration-length {spec.calibration_length} exceeds the model's {positions} "
            "positions",
            f"pass at most {positions}",
        )
    length = spec.calibration_length or min(length, positions)
    boundaries = 1
    if method == "taylor":
        first = spec.kept_whole[0]
        if of_experts:
            first = [layer.has_experts for layer in model.geometry.layers].index(True)
        boundaries = boundaries_kept(model.num_layers, first)
    needs = _held(spec, model, samples, length, boundaries)
    if method not in _BY_HESSIAN:
        return needs
    widest = hessian_bytes(model.family, config)
    if method != "yaqa":
        return replace(needs, hessian_bytes=widest)
    some = min(samples, max(1, _GRADIENT_TOKENS // length))
    gradients = _held(spec, model, some, length, boundaries_kept(model.num_layers, 0))
    outputs = [model.shapes[name][0] for name in model.linear_names]
    kept = [kept_params(rows) for rows in outputs]
    summed = FP32_BYTES * sum(kept[: len(model.family.modules)])
    return replace(
        needs,
        memory_bytes=max(needs.memory_bytes, gradients.memory_bytes),
        disk_bytes=max(needs.disk_bytes, gradients.disk_bytes) + BF16_BYTES * sum(kept),
        hessian_bytes=max(widest + 4 * FP32_BYTES * max(outputs) ** 2, summed),
        gradients=gradients,
    )


def _held(
    spec: PruneSpec, model: Model, samples: int, length: int, boundaries: int
) -> CalibrationNeeds:
    """Hidden states of windows at so many boundaries, in memory as far as it may be."""
    device = spec.device or default_device()
    item_bytes = computed_dtype(model.dtype.to_torch(), device).itemsize
    each = samples * length * model.geometry.hidden_size * item_bytes
    in_memory = min(boundaries, spec.calibration_memory // each)
    on_disk = boundaries - in_memory
    return CalibrationNeeds(samples, length, boundaries, each, in_memory * each, on_disk * each)


def load_windows(spec: PruneSpec, needs: CalibrationNeeds) -> torch.Tensor:
    """Token ids of the calibration windows, shape (samples, length).

    Raises:
        LoramError: The text is unusable, or too short.
    """
    assert spec.calibration is not None
    texts = load_text(spec.calibration)
    tokenizer = load_tokenizer(spec.read)
    return calibration_windows(texts, tokenizer, needs.samples, needs.length, spec.seed)


def open_pool(
    spec: PruneSpec, needs: CalibrationNeeds, stream: LayerStream, work: Path
) -> BoundaryPool:
    """Where hidden states between layers are kept."""
    shape = (needs.samples, needs.length, stream.hidden_size)
    return BoundaryPool(shape, stream.dtype, spec.calibration_memory, work / "activations")
