"""LoRA adapters by PEFT: what they target, how they start, how they are saved."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loram_cli.arch.experts import EXPERTS_TARGET, Experts
from loram_cli.arch.spec import Family
from loram_cli.arch.targets import lora_targets as chosen_targets
from loram_cli.checkpoint.finite import check_finite
from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME
from loram_cli.lora.wrapped import RENAMED, read_adapter
from loram_cli.modeling.load import loading
from loram_cli.modeling.low_rank import register_low_rank
from loram_cli.quiet import quiet_libraries
from loram_cli.reporting import Reporter

_OTHER_MODEL = "pass the adapter that was made for this model"


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
    targets: Sequence[str],
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    rslora: bool = False,
    experts: Experts | None = None,
) -> Any:
    """PEFT's config; defaults are the paper's (r 8, alpha 16, dropout 0.05).

    Args:
        targets: Last parts of module names.
        rank: LoRA r.
        alpha: The update is scaled by alpha / r.
        dropout: On the input of ``lora_A``.
        rslora: Scale by alpha / sqrt(r) instead (Kalajdzievski, arXiv 2312.03732).
        experts: The family's, whose weights get factors where the targets name them.

    Raises:
        UsageError: A value out of range.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UsageError(
            f"LoRA rank {rank}, alpha {alpha}, dropout {dropout}: "
            "expected rank from 1, alpha above 0, dropout from 0 to below 1"
        )
    parameters = experts.parameters if experts is not None and EXPERTS_TARGET in targets else ()
    with quiet_libraries():
        from peft import LoraConfig

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,  # PEFT takes fractions as well
            lora_dropout=dropout,
            use_rslora=rslora,
            target_modules=[name for name in targets if name != EXPERTS_TARGET],
            target_parameters=list(parameters) or None,
            bias="none",
        )
        return register_low_rank(config)


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

        with torch.random.fork_rng(), warnings.catch_warnings():
            # What PEFT says of a layer that register_low_rank has announced.
            warnings.filterwarnings("ignore", "Unsupported layer type .*LowRankLinear")
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

    Raises:
        LoramError: As :func:`load_adapter`.
    """
    return _without_input_copies(_loaded(model, adapter_dir, dropout=dropout))


def _loaded(
    model: Any, adapter_dir: Path, dropout: float | None = None, name: str = "default"
) -> Any:
    """The model with an adapter; where a dropout is given, to train on.

    As ``PeftModel.from_pretrained``, which keeps the result of the loading to itself and only
    warns of factors that are missing.
    """
    file, library = adapter_dir / CONFIG_NAME, "PEFT"
    with quiet_libraries(), warnings.catch_warnings(action="ignore"):
        from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict

        with loading(file, library):
            config = register_low_rank(LoraConfig.from_pretrained(str(adapter_dir)))
            config.inference_mode = dropout is None
            renamed = None
            if getattr(model, "wrapper", None) is not None:
                # It has the multimodal model's names, and this is only the text model.
                renamed = read_adapter(adapter_dir, model.wrapper)
                for key in RENAMED:
                    setattr(config, key, renamed.config[key])
            if dropout is not None:
                config.lora_dropout = dropout
            # A named one goes beside those that the model has; any other on top of them.
            if name == "default" or not isinstance(model, PeftModelForCausalLM):
                model = PeftModelForCausalLM(model, config, adapter_name=name)
        with loading(adapter_dir / WEIGHTS_NAME, library, _OTHER_MODEL):
            if renamed is None:
                found = model.load_adapter(str(adapter_dir), name, is_trainable=dropout is not None)
            else:
                if name not in model.peft_config:
                    model.add_adapter(name, config)
                found = set_peft_model_state_dict(model, renamed.tensors(), adapter_name=name)
    # Weights of the model itself are missing from every adapter, and so are other adapters.
    missing = [key for key in found.missing_keys if _is_factor(key, name)]
    for keys, fault in (
        (found.unexpected_keys, "the model has no module for its factor"),
        (missing, f"it has no factors for a module that {CONFIG_NAME} targets:"),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            first = _name_in_file(keys[0].removeprefix("base_model.model."), name)
            raise LoramError(f"{adapter_dir / WEIGHTS_NAME}: {fault} {first}{more}", _OTHER_MODEL)
    for key, factor in model.named_parameters():
        if _is_factor(key, name):
            check_finite(adapter_dir / WEIGHTS_NAME, _name_in_file(key, name), factor.detach())
    return model


def _is_factor(key: str, adapter: str) -> bool:
    """Whether a tensor of the model is a factor of one of its adapters."""
    return ".lora_" in key and f".{adapter}." in key


def _name_in_file(key: str, adapter: str) -> str:
    """A factor's name in the adapter's file, from that in the model."""
    return key.replace(f".{adapter}", "")


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

    Raises:
        LoramError: PEFT cannot use it, or factors and modules are not one to one.
    """
    return _loaded(model, adapter_dir).eval()


def load_beside(model: Any, adapters: Mapping[str, Path]) -> Any:
    """Put adapters on one model side by side, for :func:`with_adapter` to choose from.

    Args:
        model: The model that their shapes fit.
        adapters: By a name that PEFT takes for a module's: letters and digits.

    Raises:
        LoramError: As :func:`load_adapter`.
    """
    for name, adapter_dir in adapters.items():
        model = _loaded(model, adapter_dir, name=name)
    return model.eval()


@contextmanager
def with_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Have one of a model's adapters act within the block, or none.

    Args:
        model: From :func:`load_beside`.
        name: Of the adapter; None for the model as it is.
    """
    if name is not None:
        model.set_adapter(name, inference_mode=True)
        yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


@contextmanager
def lora_scaling(model: Any, scale: float) -> Iterator[None]:
    """Multiply every update of a model's adapters by ``scale``, for the length of the block."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * scale for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


def put_factors(model: Any, adapter_dir: Path) -> None:
    """Give an adapter that is on a model the factors of another one of the same shapes.

    Args:
        model: A ``PeftModel``.
        adapter_dir: Of the other one.

    Raises:
        LoramError: PEFT cannot use it.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = adapter_dir / WEIGHTS_NAME
    with loading(file, "PEFT", _OTHER_MODEL), quiet_libraries():
        set_peft_model_state_dict(model, load_file(file))


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
        # Without the frozen copy that may serve as a reference.
        model.save_pretrained(
            out, save_embedding_layers=False, state_dict=weights, selected_adapters=["default"]
        )
    path = out / CONFIG_NAME
    config = json.loads(path.read_text("utf-8"))
    # PEFT keeps targets in a set, whose order changes from process to process.
    config["target_modules"] = sorted(config["target_modules"] or ())
    if config.get("target_parameters"):
        # Their order says which wrapper is in which; PEFT itself goes by the module's order.
        config["target_parameters"] = sorted(config["target_parameters"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    # PEFT's model card is a form to fill in, and names the local path of the base.
    (out / "README.md").unlink(missing_ok=True)
