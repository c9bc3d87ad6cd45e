"""What a model costs, from only its config: parameters, weights, LoRA factors, training state.

Sources: Tables 4 to 6 of "Train Small, Infer Large" (arXiv 2502.13533) for the paper's counts, and
the storage layout of bitsandbytes for what NF4 takes in truth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from loram_cli.arch.experts import EXPERTS_TARGET
from loram_cli.arch.spec import LOW_RANK, Family
from loram_cli.arch.targets import lora_targets
from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.errors import UsageError

BF16_BYTES = 2
FP32_BYTES = 4

# bitsandbytes, 4 bit with double quantization (QLoRA, arXiv 2305.14314, section 3).
NF4_BLOCK_PARAMS = 64
NF4_NESTED_BLOCK = 256
# One fp32 mean that is taken off the block maxima before they are quantized.
NF4_OFFSET_BYTES = FP32_BYTES
# Every quantized tensor holds its own lookup tables: 16 values for NF4, 256 for the block maxima.
NF4_TABLE_BYTES = (16 + 256) * FP32_BYTES

# The paper's way with NF4: four parameters share one 2-byte number; nothing else is counted.
PAPER_NF4_PACKING = 4


@dataclass(frozen=True)
class ParamCount:
    """Parameters of a model, by what they are.

    Attributes:
        decoder_linear: Weights of the linear modules of all decoder layers.
        embedding: The input embedding.
        lm_head: The output head; 0 when it is tied to the embedding.
        norms: All norm weights and biases, and what else the layers hold.
        biases: Biases of the linear modules.
        experts: Weights of routed experts.
    """

    decoder_linear: int
    embedding: int
    lm_head: int
    norms: int
    biases: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        dense = self.decoder_linear + self.embedding + self.lm_head + self.norms + self.biases
        return dense + self.experts


def count_params(family: Family, config: Mapping[str, Any]) -> ParamCount:
    """Count the parameters of a model, whole or pruned by structure."""
    return _count(family, config, sparsity=0.0)


def count_nonzero_params(family: Family, config: Mapping[str, Any], sparsity: float) -> ParamCount:
    """Count what is left where single weights of all decoder linears become zero.

    For ``semi`` (2:4, sparsity 0.5) the count is exact. For ``unst`` it is the arithmetic share;
    a real checkpoint deviates by its ties and by weights that were zero before.

    Raises:
        UsageError: The sparsity is outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f"a sparsity of {sparsity} is outside [0, 1)")
    return _count(family, config, sparsity)


def reduction(base_params: int, remaining_params: int) -> float:
    """How many times smaller the model became, as Tables 4 to 6 state it."""
    return base_params / remaining_params


def removed_share(base_params: int, remaining_params: int) -> float:
    """Share of all parameters that is gone.

    Less than the paper's pruning ratio, which is the share of each pruned layer's groups:
    embeddings, head, norms and the layers kept whole lose nothing.
    """
    return 1 - remaining_params / base_params


def paper_nf4_params(params: int) -> int:
    """Parameters under NF4 as Table 6 counts them: four in the place of one, all tensors alike."""
    return -(-params // PAPER_NF4_PACKING)


def nf4_tensor_bytes(params: int) -> int:
    """Bytes of one tensor in NF4 with double quantization, as bitsandbytes stores it.

    Two weights a byte; per 64 weights an 8-bit block maximum; per 256 such maxima one in fp32; one
    offset; two lookup tables.
    """
    blocks = -(-params // NF4_BLOCK_PARAMS)
    nested_blocks = -(-blocks // NF4_NESTED_BLOCK)
    overhead_bytes = nested_blocks * FP32_BYTES + NF4_OFFSET_BYTES + NF4_TABLE_BYTES
    return -(-params // 2) + blocks + overhead_bytes


def nf4_weight_bytes(
    family: Family, config: Mapping[str, Any], other_bytes: int = BF16_BYTES
) -> int:
    """Bytes of a model's weights once loaded in NF4 with double quantization.

    Only decoder linears and experts are quantized; embedding, head, norms, routers and biases stay
    in bf16. This is more than the paper's count (:func:`paper_nf4_params` at 2
    bytes each), the more so the larger the vocabulary is beside the pruned layers.
    """
    linears = {*_linear_names(family, config), *family.expert_names(config)}
    total_bytes = 0
    for name, shape in family.tensor_shapes(config).items():
        params = math.prod(shape)
        total_bytes += nf4_tensor_bytes(params) if name in linears else params * other_bytes
    return total_bytes


def low_bit_weight_bytes(
    family: Family, config: Mapping[str, Any], low_bit: LowBit, other_bytes: int = BF16_BYTES
) -> int:
    """Bytes of a model's weights whose decoder linears are rows of few bits."""
    linears = _linear_names(family, config)
    return sum(
        shape[0] * low_bit.row_bytes(shape[1])
        if name in linears
        else math.prod(shape) * other_bytes
        for name, shape in family.tensor_shapes(config).items()
    )


def largest_linear_params(family: Family, config: Mapping[str, Any]) -> int:
    """Weights of the largest decoder linear."""
    shapes = family.tensor_shapes(config)
    return max(math.prod(shapes[name]) for name in _linear_names(family, config))


def count_lora_params(
    family: Family, config: Mapping[str, Any], rank: int, targets: Sequence[str] = ()
) -> int:
    """Trainable parameters: ``rank * (out + in)`` for every target module.

    Args:
        family: The model's family.
        config: Its ``config.json``; on a pruned one the factors are as narrow as the layers.
        rank: LoRA rank r.
        targets: Last parts of module names, the head's included; empty for what training takes:
            every decoder linear and an untied head.

    Raises:
        UsageError: The rank is not positive, a target is no module of this family, or is a head
            tied to the embedding.
    """
    return sum(lora_factor_params(family, config, rank, targets))


def lora_factor_params(
    family: Family, config: Mapping[str, Any], rank: int, targets: Sequence[str] = ()
) -> tuple[int, ...]:
    """Parameters of every single LoRA factor, A and B of one module after the other.

    Args and errors as for :func:`count_lora_params`.
    """
    if rank < 1:
        raise UsageError(f"a LoRA rank of {rank} is not positive")
    wanted = set(trained_modules(family, config, targets))
    # Where a linear is held as two factors, LoRA's stand beside their product.
    config = {key: value for key, value in config.items() if key != LOW_RANK}
    shapes = family.tensor_shapes(config)
    trained = [shapes[name] for name in _linear_names(family, config) if _last(name) in wanted]
    if EXPERTS_TARGET in wanted and family.experts is not None:
        for i in range(len(family.geometry(config).layers)):
            for name in family.experts.factor_modules:
                adapted = family.adapted_weight(f"{family.layer_prefix(i)}{name}", shapes)
                if adapted is not None:
                    trained += [(adapted.rows, adapted.columns)] * adapted.experts
    if family.lm_head_target in wanted:
        trained.append(shapes[f"{family.lm_head}.weight"])
    return tuple(rank * width for rows, columns in trained for width in (columns, rows))


def trained_modules(
    family: Family, config: Mapping[str, Any], targets: Sequence[str] = ()
) -> tuple[str, ...]:
    """The LoRA targets that training takes: an own choice, or those of the paper.

    Raises:
        UsageError: A target is no module of this family, or is a head tied to the embedding.
    """
    tied = family.geometry(config).tied_embeddings
    return lora_targets(family, tied_embeddings=tied, targets=targets or None)


def _count(family: Family, config: Mapping[str, Any], sparsity: float) -> ParamCount:
    # The decimal as it was written: in binary floating point 0.29 * 100 falls short of 29.
    share = Fraction(str(sparsity))
    linears = _linear_names(family, config)
    experts = set(family.expert_names(config))
    kinds = ("decoder_linear", "embedding", "lm_head", "norms", "biases", "experts")
    counts = dict.fromkeys(kinds, 0)
    for name, shape in family.tensor_shapes(config).items():
        params = math.prod(shape)
        if name in linears:
            counts["decoder_linear"] += params - math.floor(params * share)
        elif name in experts:
            counts["experts"] += params
        elif name == f"{family.embedding}.weight":
            counts["embedding"] += params
        elif name.startswith(f"{family.lm_head}."):
            counts["lm_head"] += params
        elif f"{name.removesuffix('.bias')}.weight" in linears:
            counts["biases"] += params
        else:
            counts["norms"] += params
    return ParamCount(**counts)


def _linear_names(family: Family, config: Mapping[str, Any]) -> dict[str, None]:
    # A dict for its order and its quick lookup.
    return dict.fromkeys(family.linear_names(config))


def _last(tensor_name: str) -> str:
    return tensor_name.removesuffix(".weight").rsplit(".", 1)[-1]
