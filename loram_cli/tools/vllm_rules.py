"""What vLLM demands of an adapter or a model, by the rules of its own loader.

Source, of vLLM 0.33: ``lora/peft_helper.py`` (``_validate_features``, ``validate_legal``),
``lora/lora_model.py`` (``check_unexpected_modules``), ``lora/utils.py``
(``parse_fine_tuned_lora_name``), ``lora/layers/logits_processor.py`` and ``config/lora.py``. What
it does with each family stands in ``arch/families``.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Family
from loram_cli.checkpoint.header import read_header
from loram_cli.checkpoint.index import read_config, read_json
from loram_cli.errors import LoramError
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME

VERSION = "0.33"
# ``MaxLoRARanks`` and its default.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_MAX_RANK = 16
# The largest vocabulary of a model whose output head may have factors.
LARGEST_VOCABULARY = 258048
_REQUIRED = ("r", "lora_alpha", "target_modules")
# Keys of adapter_config.json that its loader refuses where they are set.
_UNSUPPORTED = (
    "modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "use_bdlora", "use_qalora",
)  # fmt: skip
# Ways to start that leave the base as it is; others have PEFT change it.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)"
    r"\.(?:lora_[AB]\.weight|(?P<embedding>lora_embedding_[AB]))"
)
_MERGE = "'loram recover --merge' writes a plain checkpoint: vllm serve merged"


@dataclass
class Findings:
    """What vLLM would say.

    Attributes:
        problems: Why it would refuse, one line each.
        notes: How to start it, and what could not be checked.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_model(directory: Path) -> Findings:
    """A checkpoint: vLLM builds every layer from the same widths.

    Args:
        directory: With ``config.json``.
    """
    found = Findings()
    try:
        config = read_config(directory)
        family_for(config, str(directory))
    except LoramError as error:
        found.problems.append(error.message)
        return found
    own = _own_widths(config)
    if own:
        found.problems.append(
            f"{directory / 'config.json'}: {', '.join(own)}: the layers differ in width, and vLLM "
            "builds all alike; serve the base with the adapter that 'loram recover' writes"
        )
    else:
        found.notes.append(f"vLLM: vllm serve {directory}")
    return found


def check_adapter(directory: Path, model: Path | None) -> Findings:
    """A PEFT adapter, against the rules of vLLM's LoRA loader.

    Args:
        directory: With ``adapter_config.json``.
        model: The base that it is for, where that is at hand.
    """
    found = Findings()
    try:
        config = read_json(directory / CONFIG_NAME)
        names = [entry.name for entry in read_header(directory / WEIGHTS_NAME)]
    except LoramError as error:
        found.problems.append(error.message)
        return found
    file = directory / CONFIG_NAME
    found.problems += [f"{file}: {said}" for said in _config_problems(config)]
    if model is None:
        found.notes.append(f"vLLM: module names not checked, the base of {directory} is not here")
        found.problems += _name_problems(directory / WEIGHTS_NAME, names)
    else:
        _check_base(found, directory, model, names)
    if not found.problems:
        found.notes.append(f"vLLM: {serve_command(directory, model, config)}")
    return found


def serve_command(directory: Path, model: Path | None, config: Mapping[str, Any]) -> str:
    """The command that serves a base with an adapter.

    Args:
        directory: The adapter.
        model: The base.
        config: The parsed ``adapter_config.json``.
    """
    least = least_max_rank(config)
    rank = f" --max-lora-rank {least}" if least and least > DEFAULT_MAX_RANK else ""
    base = model if model is not None else "BASE"
    return f"vllm serve {base} --enable-lora{rank} --lora-modules {directory.name}={directory}"


def least_max_rank(config: Mapping[str, Any]) -> int | None:
    """The smallest ``--max-lora-rank`` that holds an adapter; None where none does."""
    rank = max((r for r in _ranks(config) if isinstance(r, int)), default=0)
    return next((most for most in MAX_RANKS if most >= rank), None)


def _ranks(config: Mapping[str, Any]) -> list[Any]:
    """The rank of all modules, and those of some."""
    pattern = config.get("rank_pattern") or {}
    return [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else [pattern])]


def _own_widths(config: Mapping[str, Any]) -> list[str]:
    return [key for key in config if key == "per_layer_config" or key.startswith("kept_")]


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        yield f"{', '.join(missing)} missing, which vLLM needs"
    for key in _UNSUPPORTED:
        if config.get(key):
            yield f"{key} is set, which vLLM does not support; train without it, or merge"
    if config.get("bias") not in (None, "none"):
        yield f"bias is {config['bias']!r}, and vLLM takes 'none' only"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield (
            f"init_lora_weights {init!r} changes the base, which vLLM does not do; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    ranks = _ranks(config)
    if any(not isinstance(r, int) or isinstance(r, bool) or r <= 0 for r in ranks):
        yield "a rank is no whole number above 0"
    elif least_max_rank(config) is None:
        yield f"rank {max(ranks)}, and vLLM holds {MAX_RANKS[-1]} at most; {_MERGE}"


def _check_base(found: Findings, directory: Path, model: Path, names: list[str]) -> None:
    try:
        config = read_config(model)
        family = family_for(config, str(model))
    except LoramError as error:
        found.problems.append(error.message)
        return
    if _own_widths(config):
        found.problems.append(
            f"{directory}: an adapter of the pruned {model}, which vLLM cannot build; pass the "
            "one that 'loram recover' writes"
        )
        return
    facts = family.vllm
    if facts is None:
        found.notes.append(f"vLLM: loram does not know how it loads the family {family.family}")
        found.problems += _name_problems(directory / WEIGHTS_NAME, names)
        return
    if not facts.lora:
        found.problems.append(
            f"{model}: vLLM {VERSION} takes no LoRA for {family.architecture}; {_MERGE}"
        )
        return
    if facts.backend == "transformers":
        found.notes.append(
            f"vLLM {VERSION} runs {family.architecture} through transformers: slower than a class "
            "of its own"
        )
    found.problems += _name_problems(directory / WEIGHTS_NAME, names, family)
    head = family.lm_head_target in facts.embeddings
    vocabulary = config.get("vocab_size")
    if head and isinstance(vocabulary, int) and vocabulary > LARGEST_VOCABULARY:
        found.problems.append(
            f"{model}: a vocabulary of {vocabulary}, and vLLM takes LoRA up to "
            f"{LARGEST_VOCABULARY}; {_MERGE}"
        )


def _name_problems(file: Path, names: list[str], family: Family | None = None) -> Iterator[str]:
    """Tensors whose name vLLM cannot read, and modules that it does not expect."""
    facts = family.vllm if family is not None else None
    unexpected: Counter[str] = Counter()
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match is None:
            yield f"{file}: tensor {name} is no LoRA factor that vLLM can read"
            continue
        last = match["module"].rpartition(".")[-1]
        if family is None or facts is None:
            continue
        is_linear = last in family.lora_targets and last not in facts.refused
        if last not in facts.embeddings and (match["embedding"] or not is_linear):
            unexpected[last] += 1
    for last, count in unexpected.items():
        yield (
            f"{file}: {count} factors of {last}, which vLLM {VERSION} does not take for "
            f"{family.architecture if family else 'this model'}; {_way_out(last, family)}"
        )


def _way_out(last: str, family: Family | None) -> str:
    if family is not None and last in (*family.lora_targets, family.lm_head_target):
        others = [name for name in family.lora_targets if name != last]
        return f"train with --targets {','.join(others)}, or {_MERGE}"
    return _MERGE
