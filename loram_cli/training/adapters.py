"""LoRA adapters on a model in memory. The door to peft."""

from pathlib import Path
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.errors import UsageError


def default_targets(family: Family, tied_embeddings: bool) -> tuple[str, ...]:
    """Every decoder linear and the head (paper, appendix); no head where it is the embedding.

    A LoRA on a tied head would have to change the input embedding as well, or untie it.
    """
    return family.lora_targets if tied_embeddings else (*family.lora_targets, family.lm_head_target)


def check_targets(targets: tuple[str, ...], family: Family) -> None:
    """Refuse a target that the family does not have.

    Raises:
        UsageError: An unknown name.
    """
    from loram_cli.specs import unknown_name

    known = (*family.lora_targets, family.lm_head_target)
    for target in targets:
        if target not in known:
            raise unknown_name("module", target, known, "--targets")
    if not targets:
        raise UsageError("--targets is empty")


def add_lora(
    model: Any, *, rank: int, alpha: int, dropout: float, targets: tuple[str, ...], quantized: bool
) -> Any:
    """Wrap the model so that only fresh LoRA factors train.

    Args:
        model: A causal LM whose layers may differ in width.
        rank: r.
        alpha: The update is scaled by alpha / r.
        dropout: On the adapter's input.
        targets: Module names, as PEFT's ``target_modules``.
        quantized: Whether the model is in NF4.
    """
    import peft

    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        # PEFT looks for tied weights among the targets; ours never include the embedding.
        bias="none",
    )
    return peft.get_peft_model(model, config)


def save_lora(model: Any, directory: Path) -> None:
    """Write the adapter alone; with a head among the targets PEFT would add the embedding."""
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)


def attach_lora(model: Any, adapter_dir: Path) -> Any:
    """Load a finished adapter onto a model, for inference."""
    import peft

    return peft.PeftModel.from_pretrained(model, adapter_dir).eval()
