"""What a method that takes steps trains: all weights, norms and biases, or factors of LoRA.

The fewer are trained, the less memory it takes, and the nearer the weights stay to the base's own,
which the adapter will meet.
"""

import math
from typing import Any

from loram_cli.arch.spec import LOW_RANK
from loram_cli.checkpoint.model import Model
from loram_cli.errors import UsageError
from loram_cli.memory.account import count_lora_params
from loram_cli.reporting import Reporter
from loram_cli.stages.align.settings import AlignSettings


def trained_params(spec: AlignSettings, model: Model) -> int:
    """Parameters that ``--trained`` and ``--train-lm-head`` leave to be trained."""
    shapes = {name: entry.shape for name, entry in model.index.tensors.items()}
    if spec.trained == "norms":
        return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    if spec.trained == "lora":
        targets = model.family.lora_targets
        return count_lora_params(model.family, model.config, spec.rank, targets)
    head = shapes.get(f"{model.family.lm_head}.weight")
    frozen = 0 if head is None or spec.train_lm_head else math.prod(head)
    return model.num_params - frozen


def check_trained(spec: AlignSettings, model: Model, sparse: bool) -> None:
    """Refuse factors on a model whose weights cannot take them.

    Args:
        spec: How to align.
        model: The pruned model.
        sparse: Whether pruning zeroed single weights.

    Raises:
        UsageError: See above.
    """
    if spec.trained != "lora":
        return
    if sparse:
        reason = "merging fills the zeros of"
    elif model.low_bit is not None:
        reason = "factors are not merged into the few bits of"
    elif model.config.get(LOW_RANK):
        reason = "factors are not merged into those of"
    else:
        return
    raise UsageError(
        f"--trained lora: {reason} {model.directory}", "pass --trained norms, or leave it out"
    )


def with_trained(model: Any, source: Model, spec: AlignSettings, reporter: Reporter) -> Any:
    """Let a loaded model's parameters be trained as asked.

    Of all parameters, the output head stays frozen by default, as in the paper's reference code.
    With tied embeddings the head is the embedding, and so both stay frozen: that matrix is the one
    part of the pruned model that the full model shares entry by entry, and the adapter will meet
    the original one.

    Args:
        model: The source's model; changed in place.
        source: The pruned model.
        spec: How to align.
        reporter: Notes.

    Returns:
        The model, or the PEFT model around it.
    """
    if spec.trained == "lora":
        from loram_cli.training.adapters import attach_lora, lora_config

        config = lora_config(
            source.family.lora_targets, rank=spec.rank, alpha=2 * spec.rank, dropout=0.0
        )
        return attach_lora(model, config, seed=spec.seed)
    for parameter in model.parameters():
        parameter.requires_grad_(spec.trained == "all" or parameter.dim() == 1)
    if spec.trained == "all" and not spec.train_lm_head:
        head = model.get_output_embeddings()
        head.requires_grad_(False)
        if head.weight is model.get_input_embeddings().weight:
            reporter.note("embeddings are tied: lm_head is frozen, and the embedding with it")
    return model


def merged(model: Any, spec: AlignSettings) -> Any:
    """The trained model without factors beside its weights."""
    return model.merge_and_unload() if spec.trained == "lora" else model
