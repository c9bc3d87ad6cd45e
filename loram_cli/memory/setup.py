"""How a LoRA training is set up, as far as its memory depends on it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Attention = Literal["eager", "sdpa", "flash"]
CrossEntropy = Literal["full", "chunked"]
Optimizer = Literal["adamw", "paged_adamw_8bit"]
Packing = Literal["auto", "off", "on"]

# Tokens that a pass computes for each real one, where examples may share a row: at most.
MOST_PADDING = 1.05

# Logits that the chunked cross-entropy has in memory at a time, in elements: 131 tokens of a
# vocabulary of 128k, 524 tokens of one of 32k. Enough rows to keep a matrix product busy.
CHUNK_LOGITS = 2**24


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Settings of a training run that its memory depends on; the defaults are those of ``train``.

    Attributes:
        rank: LoRA r.
        targets: Last parts of module names; empty for the paper's.
        dropout: On the input of every ``lora_A``.
        quantize: ``nf4`` holds the frozen decoder linears in 4 bits.
        micro_batch: Sequences per forward pass.
        length: Tokens per sequence, padding included.
        longest: Tokens of the longest examples in falling order, where the data is at hand: a pass
            is then counted with them, and not with ``length``.
        packing: Whether examples share rows, see :func:`loram_cli.training.data.packing.arranged`.
        gradient_checkpointing: Keep only the input of each decoder layer, and run it again.
        attention: ``sdpa`` and ``flash`` never hold the matrix of attention weights.
        cross_entropy: ``full`` holds all logits at once, as transformers' own loss does.
        optimizer: ``adamw`` has two fp32 moments, ``paged_adamw_8bit`` two of a byte each.
        precision: ``bf16`` is mixed: frozen weights and products in bf16, factors in fp32.
        padded: Whether the micro-batch holds padding, and so attention a mask.
        device: ``cuda``, or ``cpu``, whose dropout keeps its mask as numbers and not as bytes.
        processes: That share the model out (FSDP); the figures are then those of one of them.
    """

    rank: int = 8
    targets: tuple[str, ...] = ()
    dropout: float = 0.05
    quantize: Literal["nf4"] | None = None
    micro_batch: int = 4
    length: int = 512
    longest: tuple[int, ...] = ()
    packing: Packing = "off"
    gradient_checkpointing: bool = False
    attention: Attention = "sdpa"
    cross_entropy: CrossEntropy = "chunked"
    optimizer: Optimizer = "adamw"
    precision: Literal["bf16", "fp32"] = "bf16"
    padded: bool = True
    device: Literal["cuda", "cpu"] = "cuda"
    processes: int = 1

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of most activations."""
        return 2 if self.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch at most, padding included."""
        if not self.longest:
            return self.micro_batch * self.length
        # Data of fewer examples is seen again.
        missing = max(0, self.micro_batch - len(self.longest))
        real = sum(self.longest[: self.micro_batch]) + missing * self.longest[0]
        padded = self.micro_batch * self.longest[0]
        return real if self.packing == "on" else min(padded, self._with_padding(real, padded))

    def _with_padding(self, real: int, padded: int) -> int:
        return math.ceil(real * MOST_PADDING) if self.packing == "auto" else padded

    def chunk_tokens(self, vocab_size: int) -> int:
        """Tokens that pass the head at a time."""
        if self.cross_entropy == "full":
            return self.tokens
        return min(self.tokens, chunk_tokens(vocab_size))


def usual_attention(config: Mapping[str, Any]) -> Attention:
    """The kernel that a model trains with by default; only ``eager`` has capped weights."""
    return "eager" if config.get("attn_logit_softcapping") else "sdpa"


def chunk_tokens(vocab_size: int) -> int:
    """Tokens per chunk of the chunked cross-entropy.

    Args:
        vocab_size: Logits per token.
    """
    return max(1, CHUNK_LOGITS // vocab_size)
