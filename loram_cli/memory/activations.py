"""What autograd keeps between a forward and its backward pass, for LoRA on a frozen decoder.

Derived from the layers' own code (transformers' decoder layers and loss, PEFT's LoRA linears, in
mixed precision), tensor by tensor; the tests count the saved tensors of real models against it.
A product with a frozen weight keeps nothing of its input; what is kept is:

- RMS norms: their input in fp32, and a factor per token;
- LoRA linears: the input of ``lora_A`` (after dropout, so one of its own for every linear), the
  dropout's mask, the input of ``lora_B``, and factors cast to bf16;
- attention: queries, keys, values and output (``sdpa``, ``flash``), or the weights (``eager``);
- MLPs: the activation's input; in gated ones its output as well, and what it is multiplied with;
- cross-entropy: log-probabilities in fp32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loram_cli.arch.spec import Family, Geometry, LayerGeometry, LinearModule
from loram_cli.memory.account import FP32_BYTES, trained_modules
from loram_cli.memory.setup import TrainingSetup

# Log-probabilities, their gradient, and the logits' gradient, all in fp32, at the widest moment of
# torch's cross_entropy backward. The first is kept from the forward pass.
_KEPT_LOGITS_BYTES = FP32_BYTES
_PASSING_LOGITS_BYTES = 2 * FP32_BYTES


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and backward pass needs beside weights and training state.

    Attributes:
        layers: Kept by autograd for the decoder layers: everything, or with gradient
            checkpointing the layers' inputs.
        recomputed: With gradient checkpointing, what the largest layer keeps while its backward
            pass runs; else 0.
        head: Kept for the final norm and the head's input.
        logits: Kept by the cross-entropy (full), or 0.
        logits_passing: Needed beside it for the length of the cross-entropy's backward pass.
        layer_passing: Gradients of activations in flight in the widest layer, and under NF4 the
            largest weight expanded to the computation's type.
    """

    layers: int
    recomputed: int
    head: int
    logits: int
    logits_passing: int
    layer_passing: int

    @property
    def saved(self) -> int:
        """What autograd holds when the forward pass has ended."""
        return self.layers + self.head + self.logits

    @property
    def peak(self) -> int:
        """The most that is held at one time: in the cross-entropy, or in a layer's backward."""
        in_loss = self.head + self.logits + self.logits_passing
        in_layer = self.recomputed + self.layer_passing
        return self.layers + max(in_loss, in_layer)

    @property
    def loss_at_peak(self) -> int:
        """The share of :attr:`peak` that the head and the cross-entropy have."""
        in_loss = self.head + self.logits + self.logits_passing
        return in_loss if in_loss >= self.recomputed + self.layer_passing else 0


def activations(family: Family, config: Mapping[str, Any], setup: TrainingSetup) -> Activations:
    """Activation memory of one micro-batch."""
    geometry = family.geometry(config)
    targets = set(trained_modules(family, config, setup.targets))
    full = [
        _layer_kept(family, layer, geometry.hidden_size, setup, targets, first=i == 0)
        + _capped_weights(layer, config, setup)
        for i, layer in enumerate(geometry.layers)
    ]
    inputs = len(full) * geometry.hidden_size * setup.compute_bytes * setup.tokens
    # In fp32 the input that is kept for running a layer again is the one its norm keeps.
    fp32 = setup.compute_bytes == FP32_BYTES
    counted_twice = geometry.hidden_size * FP32_BYTES * setup.tokens if fp32 else 0
    vocabulary = geometry.vocab_size
    chunk = setup.chunk_tokens(vocabulary)
    whole = setup.cross_entropy == "full"
    capped = setup.compute_bytes if config.get("final_logit_softcapping") else 0
    kept = (_KEPT_LOGITS_BYTES + capped) * vocabulary * chunk
    passing = _PASSING_LOGITS_BYTES * vocabulary * chunk
    return Activations(
        layers=inputs if setup.gradient_checkpointing else sum(full),
        recomputed=max(full) - counted_twice if setup.gradient_checkpointing else 0,
        head=_head_kept(family, geometry, setup, targets),
        logits=kept if whole else 0,
        logits_passing=passing if whole else passing + kept,
        layer_passing=max(
            _passing(family, layer, geometry.hidden_size, setup) for layer in geometry.layers
        ),
    )


def _layer_kept(
    family: Family,
    layer: LayerGeometry,
    hidden: int,
    setup: TrainingSetup,
    targets: set[str],
    *,
    first: bool,
) -> int:
    """Bytes kept for one decoder layer; the first one's input wants no gradient."""
    norms = [
        norm.shape == ("hidden",)
        for norm in family.layer_norms
        if norm.name.endswith(".weight") and (not norm.kinds or layer.kind in norm.kinds)
    ]
    hidden_norms = sum(norms) - (1 if first and any(norms) else 0)
    per_token = hidden_norms * (hidden + 1) * FP32_BYTES
    if not all(norms):
        # Norms over heads, of queries and of keys.
        heads = layer.num_attention_heads + layer.num_key_value_heads
        per_token += (heads * layer.head_dim + heads) * FP32_BYTES
    per_token += _attention_kept(layer, setup)
    # The activation's input, and in gated MLPs its output and what that is multiplied with.
    modules = family.layer_modules(layer)
    branches = sum(module.rows.count("intermediate") for module in modules)
    if layer.has_mlp or not layer.has_experts:
        keeps = family.activation_keeps
        numbers = (branches + 1 if branches > 1 else 1) + keeps.numbers
        per_token += layer.intermediate_size * (numbers * setup.compute_bytes + keeps.masks)
    per_token += _experts_kept(family, layer, hidden) * setup.compute_bytes
    shared: dict[str, int] = {}
    for module in modules:
        if _target(module.name) in targets:
            from_outside = not module.columns and "intermediate" not in module.rows
            needs_grad = not (first and from_outside)
            per_token += _lora_kept(module, layer, hidden, setup, shared, needs_grad=needs_grad)
    copies = sum(
        _factor_params(module, layer, hidden, setup.rank)
        for module in modules
        if _target(module.name) in targets
    )
    mask = setup.compute_bytes * setup.length if setup.padded and setup.attention == "sdpa" else 0
    return (per_token + sum(shared.values()) + mask) * setup.tokens + copies * _cast_bytes(setup)


def _experts_kept(family: Family, layer: LayerGeometry, hidden: int) -> int:
    """Numbers per token: for each of its experts gate and up, their product, and the output."""
    if family.experts is None or not layer.has_experts:
        return 0
    width = _expert_shape(family, layer, hidden, family.experts.parameters[-1])
    columns = width[1] if family.experts.transposed else width[2]
    return layer.top_k * (3 * columns + hidden)


def _expert_shape(family: Family, layer: LayerGeometry, hidden: int, name: str) -> tuple[int, ...]:
    """Of one of the experts' weights."""
    tensor = next(tensor for tensor in family.layer_tensors if tensor.name == name)
    return layer.tensor_shape(tensor, hidden)


def _capped_weights(layer: LayerGeometry, config: Mapping[str, Any], setup: TrainingSetup) -> int:
    """Bytes of attention weights before softmax, where a family caps them by tanh."""
    if setup.attention != "eager" or not config.get("attn_logit_softcapping"):
        return 0
    return layer.num_attention_heads * setup.length * setup.compute_bytes * setup.tokens


def _attention_kept(layer: LayerGeometry, setup: TrainingSetup) -> int:
    """Bytes per token."""
    query = layer.num_attention_heads * layer.head_dim
    # With a mask, transformers repeats keys and values for every query head.
    repeated = setup.padded or setup.attention == "eager"
    key = query if repeated else layer.num_key_value_heads * layer.head_dim
    if setup.attention == "flash":
        key = layer.num_key_value_heads * layer.head_dim
    if setup.attention == "eager":
        # Softmax in fp32, and what its rounding to bf16 makes of it.
        weight_bytes = FP32_BYTES + (setup.compute_bytes if setup.compute_bytes < FP32_BYTES else 0)
        weights = layer.num_attention_heads * setup.length * weight_bytes
        return (query + 2 * key) * setup.compute_bytes + weights
    log_sums = layer.num_attention_heads * FP32_BYTES
    return (2 * query + 2 * key) * setup.compute_bytes + log_sums


def _lora_kept(
    module: LinearModule,
    layer: LayerGeometry,
    hidden: int,
    setup: TrainingSetup,
    shared: dict[str, int],
    *,
    needs_grad: bool,
) -> int:
    """Bytes per token of one LoRA linear; inputs that several may share go into ``shared``."""
    columns = sum(layer.axis_units(axis) for axis in module.columns) or hidden
    low_rank = setup.rank * setup.compute_bytes
    if setup.dropout:
        mask = _mask_bytes(setup) * columns if needs_grad else 0
        return low_rank + columns * setup.compute_bytes + mask
    if "query" in module.columns and setup.attention != "eager":
        return low_rank  # attention keeps its output already
    place = f"{module.columns}{'intermediate' in module.rows}"
    shared[place] = columns * setup.compute_bytes
    return low_rank


def _head_kept(family: Family, geometry: Geometry, setup: TrainingSetup, targets: set[str]) -> int:
    hidden, tokens = geometry.hidden_size, setup.tokens
    per_token = (hidden + 1) * FP32_BYTES
    if setup.cross_entropy == "chunked":
        # The rows that carry loss; at most all of them.
        return (per_token + hidden * setup.compute_bytes) * tokens
    copies = 0
    if family.lm_head_target in targets:
        mask = _mask_bytes(setup) * hidden if setup.dropout else 0
        per_token += (hidden + setup.rank) * setup.compute_bytes + mask
        copies = setup.rank * (hidden + geometry.vocab_size)
    return per_token * tokens + copies * _cast_bytes(setup)


def _passing(family: Family, layer: LayerGeometry, hidden: int, setup: TrainingSetup) -> int:
    """Bytes in flight in a layer's backward pass, where it is widest: below the MLP's product.

    The product's gradient by way of the frozen weight, of the factors, and their sum, less the
    factors' input, which is done with; and the gradient of the layer's output, for the MLP and for
    the residual.
    """
    in_flight = (2 * layer.intermediate_size + 2 * hidden) * setup.compute_bytes * setup.tokens
    if setup.quantize is None:
        return in_flight
    widest = max(
        (sum(layer.axis_units(axis) for axis in module.rows) or hidden)
        * (sum(layer.axis_units(axis) for axis in module.columns) or hidden)
        for module in family.layer_modules(layer)
    )
    if family.experts is not None and layer.has_experts:
        # All experts of a layer are expanded together.
        stacks = [_expert_shape(family, layer, hidden, n) for n in family.experts.parameters]
        widest = max(widest, sum(math.prod(stack) for stack in stacks))
    return in_flight + widest * setup.compute_bytes


def _factor_params(module: LinearModule, layer: LayerGeometry, hidden: int, rank: int) -> int:
    rows = sum(layer.axis_units(axis) for axis in module.rows) or hidden
    columns = sum(layer.axis_units(axis) for axis in module.columns) or hidden
    return rank * (rows + columns)


def _mask_bytes(setup: TrainingSetup) -> int:
    return 1 if setup.device == "cuda" else setup.compute_bytes


def _cast_bytes(setup: TrainingSetup) -> int:
    return setup.compute_bytes if setup.compute_bytes < FP32_BYTES else 0


def _target(module_name: str) -> str:
    return module_name.rsplit(".", 1)[-1]
