"""PEFT adapter directories: LoRA factors by module, read and written without PEFT."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.checkpoint.config_values import short
from loram_cli.checkpoint.header import read_header
from loram_cli.checkpoint.json_files import read_json
from loram_cli.errors import LoramError

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT's LoraConfig that change what an adapter computes, or what it holds.
_MORE_THAN_LORA = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save",
    "trainable_token_indices", "layer_replication", "megatron_config",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip

# Each is a list of names, or a pattern that names must match.
_NAMING = ("target_modules", "exclude_modules", "layers_pattern")
_LONGEST_PATTERN = 1000
_LONGEST_NAMING = 10_000


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
        rank = _of_module(self.config, "rank_pattern", module, "r")
        alpha = self.alpha(module)
        return float(alpha / (rank**0.5 if self.config.get("use_rslora") else rank))

    def alpha(self, module: str) -> float:
        """A module's own alpha, else that of all modules."""
        return float(_of_module(self.config, "alpha_pattern", module, "lora_alpha"))

    @classmethod
    def read(cls, directory: Path, copies: frozenset[str] = frozenset()) -> "LoraAdapter":
        """Read a PEFT LoRA directory.

        Args:
            directory: With ``adapter_config.json``.
            copies: Tensors to leave out: copies of the model's own, see :func:`model_copies`.

        Raises:
            LoramError: Not a LoRA adapter, or one with parts that recovery cannot carry over.
        """
        config = read_adapter_config(directory)
        read_header(directory / WEIGHTS_NAME)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from loram_cli.checkpoint.finite import check_finite

        try:
            tensors = load_file(directory / WEIGHTS_NAME)
        except (SafetensorError, ValueError, OSError) as error:
            raise LoramError(
                f"{directory / WEIGHTS_NAME}: safetensors refuses it ({str(error)[:100]})"
            ) from error
        factors: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name in copies:
                continue
            module, kind = _factor_name(directory, name)
            if tensor.dim() != 2 or not tensor.is_floating_point():
                raise LoramError(
                    f"{directory / WEIGHTS_NAME}: tensor {name} is no matrix of floating numbers"
                )
            check_finite(directory / WEIGHTS_NAME, name, tensor)
            factors.setdefault(module, {})[kind] = tensor
        for module, pair in factors.items():
            if len(pair) != 2:
                raise LoramError(f"{directory / WEIGHTS_NAME}: {module} has only one LoRA factor")
            a, b = pair["lora_A"].shape[0], pair["lora_B"].shape[1]
            rank = _of_module(config, "rank_pattern", module, "r")
            # Factors of several experts lie one after the other.
            stacked = bool(config.get("target_parameters")) and a == b and a % rank == 0
            if not (a == b == rank or stacked):
                raise LoramError(
                    f"{directory / WEIGHTS_NAME}: {module} has factors of rank {a} and {b}, "
                    f"{CONFIG_NAME} says r {rank}"
                )
        if not factors:
            raise LoramError(f"{directory / WEIGHTS_NAME}: no LoRA factors")
        return cls(config, {m: LoraPair(p["lora_A"], p["lora_B"]) for m, p in factors.items()})

    def tensors(self) -> "dict[str, torch.Tensor]":
        """All factors under their names in PEFT's file."""
        tensors = {}
        for module, pair in self.pairs.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.lora_a.contiguous()
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.lora_b.contiguous()
        return tensors

    def write(self, directory: Path) -> None:
        """Write as PEFT does.

        Raises:
            LoramError: The disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(self.tensors(), directory / WEIGHTS_NAME, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise LoramError(f"{directory / WEIGHTS_NAME}: cannot write ({error})") from error
        # The first pattern that matches a module counts, so their order is kept.
        text = json.dumps(dict(sorted(self.config.items())), indent=2)
        (directory / CONFIG_NAME).write_text(text + "\n", "utf-8")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The parsed ``adapter_config.json`` of a LoRA adapter that adds ``scaling * B @ A`` only.

    Raises:
        LoramError: It is absent, of another kind of adapter, asks for more than LoRA, or has
            values that cannot be.
    """
    file = directory / CONFIG_NAME
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise LoramError(f"{file}: peft_type is {short(config.get('peft_type'))}, expected 'LORA'")
    for key in _MORE_THAN_LORA:
        if config.get(key) not in (None, False, [], ""):
            raise LoramError(
                f"{file}: {key} is {short(config[key])}: only plain LoRA is supported",
                f"train the adapter without {key}",
            )
    if config.get("bias", "none") != "none":
        raise LoramError(
            f"{file}: bias is {short(config['bias'])}: only plain LoRA is supported",
            "train the adapter with bias 'none'",
        )
    _check_number(file, "r", config.get("r"), whole=True)
    _check_number(file, "lora_alpha", config.get("lora_alpha"))
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise LoramError(f"{file}: lora_dropout is {short(dropout)}, expected a number from 0 to 1")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise LoramError(f"{file}: {key} is {short(pattern)}, expected a mapping")
        for name, value in pattern.items():
            _check_number(file, f"{key} {name}", value, whole=key == "rank_pattern")
            try:
                re.compile(name)
            except (re.error, RecursionError, OverflowError) as error:
                raise LoramError(f"{file}: {key} {name}: not a pattern ({error})") from error
            if not _is_quick(name):
                raise LoramError(
                    f"{file}: {key} {short(name)}: matching it could take without end",
                    "name the modules with at most 3 repetitions and 4 groups, none repeated",
                )
    for key in ("use_rslora", "fan_in_fan_out"):
        if config.get(key) not in (None, True, False):
            raise LoramError(f"{file}: {key} is {short(config[key])}, expected true or false")
    for key in _NAMING:
        _check_naming(file, key, config.get(key))
    layers = config.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer is not None and not (type(layer) is int and 0 <= layer < 2**31):
            raise LoramError(
                f"{file}: layers_to_transform is {short(layers)}, expected whole numbers from 0"
            )
    return config


def _check_naming(file: Path, key: str, value: object) -> None:
    """Refuse what names no modules, or takes without end to compare with their names."""
    if value is None or (isinstance(value, list) and all(isinstance(n, str) for n in value)):
        return
    if not isinstance(value, str):
        raise LoramError(f"{file}: {key} is {short(value)}, expected names or a pattern")
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise LoramError(f"{file}: {key} {short(value)}: not a pattern ({error})") from error
    # What other trainers write has many groups and a few repetitions one after the other.
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", value)
    repetitions = len(re.findall(r"[*+{]", bare))
    if len(value) > _LONGEST_NAMING or repetitions > 5 or re.search(r"\)[*+{]", bare):
        raise LoramError(
            f"{file}: {key} {short(value)}: matching it could take without end",
            "name the modules in a list, or with at most 5 repetitions and no repeated group",
        )


def _check_number(file: Path, key: str, value: object, *, whole: bool = False) -> None:
    # A rank is a whole number above 0; an alpha may be any, and that it is finite is known.
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31
    if not number or (whole and not (isinstance(value, int) and value > 0)):
        words = "a whole number above 0" if whole else "a number"
        raise LoramError(f"{file}: {key} is {short(value)}, expected {words}")


def _is_quick(pattern: str) -> bool:
    """Whether any module's name is matched soon, though a pattern may be a stranger's.

    Python's ``re`` goes back and forth: a repeated group, or many repetitions or alternatives one
    after the other, can take exponentially long.
    """
    bare = re.sub(r"\\.|\(\?:", lambda found: "(" if found[0] == "(?:" else "", pattern)
    repetitions = len(re.findall(r"[*+?{]", bare))
    repeated_group = re.search(r"\)[*+?{]", bare) is not None
    short_enough = len(pattern) <= _LONGEST_PATTERN
    return short_enough and repetitions <= 3 and bare.count("(") <= 4 and not repeated_group


def _of_module(config: dict[str, Any], pattern: str, module: str, default: str) -> Any:
    """A module's own value, else that of all modules; keys match as in PEFT's get_pattern_key."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[default]


def model_copies(directory: Path) -> dict[str, str]:
    """Weights of the model that PEFT saves beside the factors of an output head.

    Returns:
        By tensor name, the model's own name of the same tensor.
    """
    names = [entry.name for entry in read_header(directory / WEIGHTS_NAME)]
    kinds = (".lora_A.weight", ".lora_B.weight")
    return {
        name: name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        for name in names
        if name.startswith(_PREFIX) and name.endswith(".weight") and not name.endswith(kinds)
    }


def read_shapes(
    directory: Path, copies: frozenset[str] = frozenset()
) -> dict[str, tuple[int, int, int]]:
    """Per module its output features, input features and rank, read from the header only.

    Args:
        directory: With ``adapter_config.json``.
        copies: Tensors to leave out, see :func:`model_copies`.

    Raises:
        LoramError: Not a sound file of LoRA factors.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for entry in read_header(directory / WEIGHTS_NAME):
        if entry.name in copies:
            continue
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
