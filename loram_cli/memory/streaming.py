"""What LoRA on a full model takes whose decoder layers come and go, and what it moves in a step.

The counterpart of :mod:`loram_cli.modeling.layerwise.lora_pass`: embedding, head, norms, factors
and their state are on the device throughout; two decoder layers are; hidden states of every
micro-batch at every layer boundary are, or lie beside the device; and one layer is run again for
its backward pass at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.memory.account import BF16_BYTES, nf4_tensor_bytes
from loram_cli.memory.activations import activations
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import TrainingMemory, training_memory

# The layer that is at work, and the one that comes next.
HELD_LAYERS = 2
# torch's generator on a CPU (Mersenne Twister), and on a GPU (Philox: seed and offset).
_GENERATOR_BYTES = {"cpu": 5056, "cuda": 16}
# Products of a forward, a second forward and a backward pass, by weight and token: a frozen weight
# has no gradient of its own.
_FLOPS_PER_WEIGHT = 3 * 2
# To start a layer's kernels, to those of a bf16 layer that keeps its activations: 12 ms with a
# second forward pass to 6 ms without, beside an H100, and 17 ms with weights in NF4 (bench-gpu).
_STARTS = 2.0
_NF4_STARTS = 1.4


@dataclass(frozen=True)
class StreamedMemory(TrainingMemory):
    """Peak memory of training layer by layer, in bytes by part.

    Attributes:
        layers: The share of :attr:`weights` that comes and goes: two decoder layers, and under NF4
            the largest weight of a third while it is quantized.
        boundaries: The share of :attr:`activations` that is hidden states at layer boundaries.
        host: Beside the device: copies of the layers, and hidden states that are kept there.
    """

    layers: int = 0
    boundaries: int = 0
    host: int = 0


@dataclass(frozen=True)
class StepTraffic:
    """What an optimizer step moves and computes.

    Attributes:
        device_bytes: Weights to the device, in the form that it holds.
        disk_bytes: Weights from the checkpoint, as it stores them.
        state_bytes: Hidden states and gradients to and from the machine's memory or a file.
        flops: Of the products with frozen weights, both forward passes and the backward pass.
        layer_starts: How often a decoder layer's kernels are started, both forward passes and the
            backward pass: a fast GPU waits for them, however few numbers they work on. Those of a
            bf16 layer that keeps its activations, forward and back, count as 1.
    """

    device_bytes: int
    disk_bytes: int
    state_bytes: int
    flops: int
    layer_starts: float

    def seconds(
        self,
        *,
        device_bandwidth: float,
        disk_bandwidth: float,
        flops_per_second: float,
        start_seconds: float,
    ) -> float:
        """A step's time: the slowest of computing, starting, copying and reading, which overlap.

        Args:
            device_bandwidth: Bytes a second between the machine's memory and the device.
            disk_bandwidth: Bytes a second from the disk.
            flops_per_second: Of the device.
            start_seconds: What the machine's processor takes for one of ``layer_starts``.
        """
        copying = (self.device_bytes + self.state_bytes) / device_bandwidth
        starting = self.layer_starts * start_seconds
        computing = self.flops / flops_per_second
        return max(copying, self.disk_bytes / disk_bandwidth, computing, starting)


def streamed_training_memory(
    family: Family,
    config: Mapping[str, Any],
    setup: TrainingSetup,
    micro_batches: int,
    *,
    stay: int = 0,
    offload_activations: bool = False,
    host_copies: bool = False,
) -> StreamedMemory:
    """Peak memory of LoRA layer by layer, from only the config.

    Args:
        family: The model's family.
        config: Its ``config.json``.
        setup: How it is trained; checkpointing, cross-entropy and padding are as layer by layer
            has them, whatever it says.
        micro_batches: Of an optimizer step.
        stay: Layers that stay on the device, from the first one on.
        offload_activations: Whether hidden states are kept beside the device.
        host_copies: Whether the machine's memory holds the other layers.

    Raises:
        UsageError: A LoRA target that the family does not have.
    """
    setup = _as_streamed(setup)
    whole = training_memory(family, config, setup)
    one = activations(family, config, setup)
    layers = layer_bytes(family, config, setup)
    passing = layers[stay:]
    held = max((sum(two) for two in pairwise(passing)), default=sum(passing))
    turned = 0
    if setup.quantize == "nf4" and passing:
        turned = _largest_linear(family, config) * setup.compute_bytes
    states = len(layers) * micro_batches * _state_bytes(family, config, setup)
    generator = _GENERATOR_BYTES[setup.device] * len(layers) * micro_batches
    # The states of generators are on the CPU in any case.
    generator = generator if setup.dropout and setup.device == "cpu" else 0
    in_loss = one.head + one.logits_passing
    working = one.recomputed + max(in_loss, one.layer_passing)
    logits = in_loss if in_loss >= one.layer_passing else 0
    kept = 0 if offload_activations else states
    return StreamedMemory(
        weights=whole.weights - sum(passing) + held + turned,
        adapter=whole.adapter,
        gradients=whole.gradients,
        optimizer=whole.optimizer,
        activations=kept + generator + working - logits,
        logits=logits,
        context=whole.context,
        layers=held + turned,
        boundaries=kept,
        host=(sum(passing) if host_copies else 0) + (states if offload_activations else 0),
    )


def step_traffic(
    family: Family,
    config: Mapping[str, Any],
    setup: TrainingSetup,
    micro_batches: int,
    *,
    stay: int = 0,
    offload_activations: bool = False,
    host_copies: bool = False,
    stored_bytes: int = BF16_BYTES,
) -> StepTraffic:
    """What a step moves, however many micro-batches it has, once the first step is done.

    Where the order of layers turns round, at the last one and at the first one, the two that are
    held need not come again.

    Args:
        family: The model's family.
        config: Its ``config.json``.
        setup: As for :func:`streamed_training_memory`; so are the settings below.
        micro_batches: Of an optimizer step.
        stay: Layers that stay.
        offload_activations: Whether hidden states are kept beside the device.
        host_copies: Whether the machine's memory holds the other layers.
        stored_bytes: Per parameter of the checkpoint.
    """
    setup = _as_streamed(setup)
    layers = layer_bytes(family, config, setup)
    params = [_params(shapes) for shapes in _layer_shapes(family, config)]
    forward, backward = layers[stay:][HELD_LAYERS:], layers[stay:][:-HELD_LAYERS]
    read = sum(params[stay:][HELD_LAYERS:]) + sum(params[stay:][:-HELD_LAYERS])
    hidden = micro_batches * _state_bytes(family, config, setup)
    geometry = family.geometry(config)
    products = sum(params) + geometry.vocab_size * geometry.hidden_size
    # Forward, hidden states are written once and read twice; gradients are written and read once.
    moved = 5 * len(layers) * hidden if offload_activations else 0
    starts = _STARTS * (_NF4_STARTS if setup.quantize == "nf4" else 1.0)
    return StepTraffic(
        device_bytes=sum(forward) + sum(backward),
        disk_bytes=0 if host_copies else read * stored_bytes,
        state_bytes=moved,
        flops=_FLOPS_PER_WEIGHT * products * micro_batches * setup.tokens,
        layer_starts=starts * len(layers) * micro_batches,
    )


def layer_bytes(family: Family, config: Mapping[str, Any], setup: TrainingSetup) -> list[int]:
    """Bytes of every decoder layer in the form that the device holds.

    Args:
        family: The model's family.
        config: Its ``config.json``.
        setup: Gives that form.
    """
    linears = set(family.linear_names(config))

    def held(name: str, params: int) -> int:
        quantized = setup.quantize == "nf4" and name in linears
        return nf4_tensor_bytes(params) if quantized else params * setup.compute_bytes

    layers = _layer_shapes(family, config)
    return [sum(held(name, prod(shape)) for name, shape in at.items()) for at in layers]


def _as_streamed(setup: TrainingSetup) -> TrainingSetup:
    return replace(setup, gradient_checkpointing=True, cross_entropy="chunked", padded=False)


def _layer_shapes(family: Family, config: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    layers = enumerate(family.geometry(config).layers)
    return [family.layer_shapes(i, layer, config) for i, layer in layers]


def _params(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _largest_linear(family: Family, config: Mapping[str, Any]) -> int:
    linears = set(family.linear_names(config))
    layers = _layer_shapes(family, config)
    return max(prod(shape) for at in layers for name, shape in at.items() if name in linears)


def _state_bytes(family: Family, config: Mapping[str, Any], setup: TrainingSetup) -> int:
    """Hidden states of one micro-batch at one boundary."""
    return setup.tokens * family.geometry(config).hidden_size * setup.compute_bytes
