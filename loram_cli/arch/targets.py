"""Which modules of a model get LoRA factors."""

from collections.abc import Sequence

from loram_cli.arch.experts import EXPERTS_TARGET
from loram_cli.arch.spec import Family
from loram_cli.errors import UsageError
from loram_cli.schema import unknown_name

# PEFT's word for every linear but the output head.
ALL_LINEAR = "all-linear"


def lora_targets(
    family: Family, *, tied_embeddings: bool, targets: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Module names that get LoRA factors: every decoder linear and an untied output head (paper).

    A tied head is left out: its factors would have to be merged into the embedding as well.

    Args:
        family: Of the model.
        tied_embeddings: Whether the head is the embedding.
        targets: An own choice among the family's modules, in place of these;
            :data:`ALL_LINEAR` alone for all but the head.

    Raises:
        UsageError: A target that the family does not have, or a tied head.
    """
    head = family.lm_head_target
    usual = (*family.lora_targets, head)
    # Experts get factors only where they are asked for: the others keep their full shape, so that
    # recovery changes nothing and any server loads the adapter.
    known = (*usual, EXPERTS_TARGET) if family.experts is not None else usual
    if targets is not None and tuple(targets) == (ALL_LINEAR,):
        return family.lora_targets
    if targets is None:
        return family.lora_targets if tied_embeddings else usual
    if not targets:
        raise UsageError("no LoRA targets", f"known: {', '.join(known)}")
    for name in targets:
        if name not in known:
            raise unknown_name("LoRA target", name, (*known, ALL_LINEAR), f"family {family.family}")
    if head in targets and tied_embeddings:
        raise UsageError(f"LoRA target {head}: this model's head is tied to its embedding")
    return tuple(targets)
