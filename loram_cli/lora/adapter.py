"""PEFT adapter directories: LoRA factors by module, read and written without PEFT."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.checkpoint.header import read_header
from loram_cli.checkpoint.index import read_json
from loram_cli.errors import LoramError

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraPair:
    """Factors of one module: ``lora_A`` of shape (r, in), ``lora_B`` of shape (out, r)."""

    lora_a: "torch.Tensor"
    lora_b: "torch.Tensor"


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter in memory (it is small whatever the model)."""

    config: dict[str, Any]
    pairs: dict[str, LoraPair]

    def scaling(self, module: str) -> float:
        """The factor on ``B @ A``: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank = self.config.get("rank_pattern", {}).get(module, self.config["r"])
        alpha = self.config.get("alpha_pattern", {}).get(module, self.config["lora_alpha"])
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    @classmethod
    def read(cls, directory: Path) -> "LoraAdapter":
        """Read a PEFT LoRA directory.

        Raises:
            LoramError: Not a LoRA adapter, or one with parts that recovery cannot carry over.
        """
        config = read_json(directory / CONFIG_NAME)
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            raise LoramError(f"{directory}: only plain LoRA adapters can be recovered")
        _check_config(directory / CONFIG_NAME, config)
        read_header(directory / WEIGHTS_NAME)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(directory / WEIGHTS_NAME)
        except (SafetensorError, ValueError, OSError) as error:
            raise LoramError(
                f"{directory / WEIGHTS_NAME}: safetensors refuses it ({str(error)[:100]})"
            ) from error
        factors: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            module, kind = _factor_name(directory, name)
            if tensor.dim() != 2 or not tensor.is_floating_point():
                raise LoramError(
                    f"{directory / WEIGHTS_NAME}: tensor {name} is no matrix of floating numbers"
                )
            if not tensor.isfinite().all():
                raise LoramError(f"{directory / WEIGHTS_NAME}: tensor {name} has NaN or infinity")
            factors.setdefault(module, {})[kind] = tensor
        for module, pair in factors.items():
            if len(pair) != 2:
                raise LoramError(f"{directory / WEIGHTS_NAME}: {module} has only one LoRA factor")
            a, b = pair["lora_A"].shape[0], pair["lora_B"].shape[1]
            rank = config.get("rank_pattern", {}).get(module, config["r"])
            if not a == b == rank:
                raise LoramError(
                    f"{directory / WEIGHTS_NAME}: {module} has factors of rank {a} and {b}, "
                    f"{CONFIG_NAME} says r {rank}"
                )
        if not factors:
            raise LoramError(f"{directory / WEIGHTS_NAME}: no LoRA factors")
        return cls(config, {m: LoraPair(p["lora_A"], p["lora_B"]) for m, p in factors.items()})

    def write(self, directory: Path) -> None:
        """Write as PEFT does.

        Raises:
            LoramError: The disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {}
        for module, pair in self.pairs.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.lora_a.contiguous()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.lora_b.contiguous()
        try:
            save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise LoramError(f"{directory / WEIGHTS_NAME}: cannot write ({error})") from error
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (directory / CONFIG_NAME).write_text(text + "\n", "utf-8")


def _check_config(file: Path, config: dict[str, Any]) -> None:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank < 2**31:
        raise LoramError(f"{file}: r is {str(rank)[:40]}, a whole number above 0 is wanted")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise LoramError(f"{file}: lora_alpha is {str(alpha)[:40]}, a number is wanted")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key, {}), dict):
            raise LoramError(f"{file}: {key} is no mapping")


def read_shapes(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Per module its output features, input features and rank, from the header alone.

    Raises:
        LoramError: Not a sound file of LoRA factors.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for entry in read_header(directory / WEIGHTS_NAME):
        module, kind = _factor_name(directory, entry.name)
        shapes.setdefault(module, {})[kind] = entry.shape
    for module, pair in shapes.items():
        a, b = pair.get("lora_A", ()), pair.get("lora_B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise LoramError(
                f"{directory / WEIGHTS_NAME}: the LoRA factors of {module} do not match"
            )
    return {m: (p["lora_B"][0], p["lora_A"][1], p["lora_A"][0]) for m, p in shapes.items()}


def _factor_name(directory: Path, name: str) -> tuple[str, str]:
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    if not name.startswith(_PREFIX) or kind not in ("lora_A", "lora_B"):
        raise LoramError(
            f"{directory / WEIGHTS_NAME}: tensor {name} is not a LoRA factor",
            "train the adapter with LoRA on linear layers only",
        )
    return module.removeprefix(_PREFIX), kind
