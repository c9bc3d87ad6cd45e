"""What training LoRA factors takes on a device, part by part, and what then fits on a card."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.memory import account
from loram_cli.memory.activations import Activations, activations
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.sharing import shared_weight_bytes
from loram_cli.units import GIB

# A process's CUDA context with all of PyTorch's kernels loaded, as measured in
# https://github.com/pytorch/pytorch/pull/86509 (287047680 with kernels loaded on first use, the
# default since; the more careful figure is taken, because a training uses many kernels).
CUDA_CONTEXT_BYTES = 666_632_192

# Memory of the common cards, in GiB.
CARDS_GIB = (8, 12, 16, 24, 40, 48, 80)

# A twentieth of a card is left free: the allocator's rounding and fragments, and the driver's own
# share, which no formula here covers.
USABLE_SHARE = 0.95

# bitsandbytes keeps moments in fp32 for tensors smaller than this, and else one byte per element
# with one fp32 maximum per block.
_SMALLEST_8BIT_PARAMS = 4096
_BLOCK_8BIT_PARAMS = 256

# More are not asked for.
LARGEST_MICRO_BATCH = 4096


@dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of a training, in bytes by part.

    Attributes:
        weights: The frozen model.
        adapter: LoRA factors, in fp32.
        gradients: Of the factors.
        optimizer: AdamW's moments.
        activations: What autograd keeps and what is in flight at the peak, without the head.
        logits: The head's and the cross-entropy's share of the same moment.
        context: Of CUDA; 0 on a CPU.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    context: int

    @property
    def state(self) -> int:
        """Factors, gradients and moments together."""
        return self.adapter + self.gradients + self.optimizer

    @property
    def allocated(self) -> int:
        """What the device's allocator is asked for: all but the context."""
        return self.weights + self.state + self.activations + self.logits

    @property
    def total(self) -> int:
        """All parts."""
        return self.allocated + self.context

    def fits(self, memory_bytes: int) -> bool:
        """Whether a card of so much memory holds it, with its usual reserve left free."""
        return self.total <= memory_bytes * USABLE_SHARE

    @property
    def smallest_card_gib(self) -> int | None:
        """The smallest of the common cards that holds it, or None."""
        return next((card for card in CARDS_GIB if self.fits(card * GIB)), None)


def training_memory(
    family: Family, config: Mapping[str, Any], setup: TrainingSetup
) -> TrainingMemory:
    """Peak memory of a LoRA training, from only the config.

    Raises:
        UsageError: A LoRA target that the family does not have.
    """
    factors = account.lora_factor_params(family, config, setup.rank, setup.targets)
    # Sliced row by row; the last process may hold a row less.
    factors = tuple(-(-count // setup.processes) for count in factors)
    params = sum(factors)
    needed = activations(family, config, setup)
    return TrainingMemory(
        weights=frozen_weight_bytes(family, config, setup),
        adapter=params * account.FP32_BYTES,
        gradients=params * account.FP32_BYTES,
        optimizer=sum(optimizer_bytes(count, setup.optimizer) for count in factors),
        activations=needed.peak - _loss_share(needed),
        logits=_loss_share(needed),
        context=CUDA_CONTEXT_BYTES if setup.device == "cuda" else 0,
    )


def frozen_weight_bytes(family: Family, config: Mapping[str, Any], setup: TrainingSetup) -> int:
    """Bytes of the frozen model in the precision that it is trained in, on one process."""
    low_bit = LowBit.of_config(config, "config.json")
    if low_bit is not None:
        held = account.low_bit_weight_bytes(family, config, low_bit, setup.compute_bytes)
        # The one that works: its codes, a byte each, and its floating weight with a copy.
        working = account.largest_linear_params(family, config)
        return held + working * (1 + 2 * setup.compute_bytes)
    if setup.processes > 1:
        return shared_weight_bytes(family, config, setup)
    if setup.quantize == "nf4":
        return account.nf4_weight_bytes(family, config, other_bytes=setup.compute_bytes)
    return account.count_params(family, config).total * setup.compute_bytes


def optimizer_bytes(params: int, optimizer: str) -> int:
    """AdamW's two moments of one tensor."""
    if optimizer == "adamw" or params < _SMALLEST_8BIT_PARAMS:
        return 2 * params * account.FP32_BYTES
    blocks = -(-params // _BLOCK_8BIT_PARAMS)
    return 2 * (params + blocks * account.FP32_BYTES)


def generation_bytes(
    family: Family, config: Mapping[str, Any], setup: TrainingSetup, sequences: int
) -> int:
    """What drawing completions holds beside the weights.

    Keys and values of every token in every layer, the widest layer's once more while they are
    joined with the newest, and logits and probabilities of the next token in fp32.
    """
    geometry = family.geometry(config)
    kept = [
        2 * layer.num_key_value_heads * layer.head_dim * setup.compute_bytes * setup.length
        for layer in geometry.layers
    ]
    next_token = 3 * geometry.vocab_size * account.FP32_BYTES
    return sequences * (sum(kept) + max(kept) + next_token)


def largest_micro_batch(
    family: Family, config: Mapping[str, Any], setup: TrainingSetup, memory_bytes: int
) -> int | None:
    """The largest micro-batch that fits a card, or None where not even one sequence does."""

    def fits(micro_batch: int) -> bool:
        tried = replace(setup, micro_batch=micro_batch)
        return training_memory(family, config, tried).fits(memory_bytes)

    return largest(fits, LARGEST_MICRO_BATCH)


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to ``most`` that fits; where one does, all smaller ones do."""
    if not fits(1):
        return None
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _loss_share(needed: Activations) -> int:
    return needed.loss_at_peak
