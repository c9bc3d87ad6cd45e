"""LoRA adapters by PEFT: what they target, how they start, how they are saved."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loram_cli.arch.spec import Family
from loram_cli.arch.targets import lora_targets as chosen_targets
from loram_cli.errors import UsageError
from loram_cli.quiet import quiet_libraries
from loram_cli.reporting import Reporter


def lora_targets(
    family: Family,
    *,
    tied_embeddings: bool,
    reporter: Reporter,
    targets: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """As :func:`loram_cli.arch.targets.lora_targets`, and says when the head is left out.

    Raises:
        UsageError: A target that the family does not have, or a tied head.
    """
    if targets is None and tied_embeddings:
        reporter.note(f"embeddings are tied: {family.lm_head_target} gets no LoRA factors")
    return chosen_targets(family, tied_embeddings=tied_embeddings, targets=targets)


def lora_config(
    targets: Sequence[str], *, rank: int = 8, alpha: float = 16, dropout: float = 0.05
) -> Any:
    """PEFT's config; defaults are the paper's (r 8, alpha 16, dropout 0.05).

    Args:
        targets: From :func:`lora_targets`.
        rank: Of the factors.
        alpha: The product is scaled by alpha / rank.
        dropout: On the input of ``lora_A`` while training.

    Raises:
        UsageError: A value out of range.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UsageError(
            f"LoRA rank {rank}, alpha {alpha}, dropout {dropout}: "
            "expected rank from 1, alpha above 0, dropout from 0 to below 1"
        )
    with quiet_libraries():
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(targets),
            bias="none",
        )


def attach_lora(model: Any, config: Any, *, seed: int) -> Any:
    """Freeze the model and give it LoRA factors in fp32; ``lora_B`` is zero.

    Args:
        model: A causal LM, its layers possibly of different widths or in 4 bits; changed in place.
        config: From :func:`lora_config`.
        seed: Decides the initial ``lora_A``; torch's global generators are left as they were.

    Returns:
        A ``PeftModel``.
    """
    with quiet_libraries():
        from peft import get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(model, config)
    return _without_input_copies(model)


def continue_lora(model: Any, adapter_dir: Path, *, dropout: float) -> Any:
    """Freeze the model and give it the factors of an earlier training, in fp32, to train on.

    Args:
        model: The model that the adapter was trained on; changed in place.
        adapter_dir: Written by ``train``.
        dropout: On the input of ``lora_A``, whatever it was before.

    Returns:
        A ``PeftModel``.
    """
    with quiet_libraries():
        from peft import LoraConfig, PeftModel

        config = LoraConfig.from_pretrained(adapter_dir)
        config.lora_dropout = dropout
        config.inference_mode = False
        model = PeftModel.from_pretrained(model, adapter_dir, config=config, is_trainable=True)
    return _without_input_copies(model)


def _without_input_copies(model: Any) -> Any:
    """Mixed precision casts a factor's input to bf16; PEFT would first copy it to fp32."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


def load_adapter(model: Any, adapter_dir: Path) -> Any:
    """Put a finished adapter on a model, for inference.

    Args:
        model: The model that the adapter's shapes fit.
        adapter_dir: Written by ``train`` or ``recover``.
    """
    with quiet_libraries():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, adapter_dir).eval()


def save_adapter(
    model: Any,
    out: Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter as PEFT does, without the embeddings and the same bytes each time.

    Args:
        model: A ``PeftModel``.
        out: Directory to write into.
        weights: The factors, where those in the model are slices.
    """
    with quiet_libraries():
        model.save_pretrained(out, save_embedding_layers=False, state_dict=weights)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    # PEFT keeps targets in a set, whose order changes from process to process.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    # PEFT's model card is a form to fill in, and names the local path of the base.
    (out / "README.md").unlink(missing_ok=True)
