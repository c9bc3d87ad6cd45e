"""What is odd about a model, and no reason to refuse it: each with what follows from it.

transformers logs the like when it builds a model, and :mod:`loram_cli.quiet` silences it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.config_values import rotary_settings, short
from loram_cli.checkpoint.identity import same_sample
from loram_cli.checkpoint.json_files import read_json
from loram_cli.checkpoint.model import Model

# Settings of rotary embeddings that transformers reads, whatever their kind; those of some
# families after the first line.
ROPE_KEYS = frozenset({
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "truncate", "type",
    "interleaved", "llama_4_scaling_beta", "max_position_embeddings", "mrope_interleaved",
    "mrope_section",
})  # fmt: skip
# Families whose tokenizers were once published with a wrong pattern; larger ones only.
_MISTRAL = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
_MISTRAL_TOKENS = 100_000
_LENGTH = "max_position_embeddings"


def oddities(model: Model) -> Iterator[str]:
    """What is odd about a model's config and head, one line each."""
    file = model.directory / "config.json"
    yield from (f"{file}: {line}" for line in _of_tokens(model.config, model.geometry.vocab_size))
    full = model.family.full_config(model.config)
    for place, rope in rotary_settings(model.config):
        yield from (f"{file}: {place}: {line}" for line in _of_rotary(rope, full))
    generation = model.directory / "generation_config.json"
    if generation.is_file():
        found = _of_tokens(read_json(generation), model.geometry.vocab_size)
        yield from (f"{generation}: {line}" for line in found)
    yield from _of_tokenizer(model.directory)
    yield from _of_head(model)


def _of_tokenizer(directory: Path) -> Iterator[str]:
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    data = read_json(file) if file.is_file() else {}
    model, splits = data.get("model"), data.get("pre_tokenizer")
    if not isinstance(model, Mapping):
        return  # told where it is loaded
    if model.get("dropout"):
        yield (
            f"{file}: dropout is {short(model['dropout'])}: every text is split at random, and no "
            "result can be repeated; set it to null"
        )
    # As transformers tells them from others that the same company has published since.
    stated = read_json(directory / "config.json")
    older = str(stated.get("transformers_version") or "0").partition(".")[0] in set("01234")
    fixed = settings.is_file() and read_json(settings).get("fix_mistral_regex")
    large = len(model.get("vocab") or ()) > _MISTRAL_TOKENS
    # The pattern that they were trained with tells capitals from small letters.
    split_wrongly = large and splits and "p{Lu}" not in str(splits.values())
    if split_wrongly and stated.get("model_type") in _MISTRAL and older and not fixed:
        yield (
            f"{file}: splits words by another pattern than Mistral's models were trained with; "
            f'put "fix_mistral_regex": true into {settings.name}'
        )


def _of_tokens(config: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    follows = {"eos_token_id": "no answer ends by it", "bos_token_id": "no text can begin with it"}
    for key, said in follows.items():
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            # -1 is how early files say that there is none.
            if type(token) is int and not -1 <= token < vocab_size:
                yield f"{key} {short(token)} is beyond the vocabulary of {vocab_size}: {said}"


def _of_rotary(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    unknown = sorted(str(key) for key in rope if key not in ROPE_KEYS)
    if unknown:
        yield f"{', '.join(map(short, unknown[:4]))}: not known to transformers, and ignored"
    factor = rope.get("factor")
    if factor is not None and factor < 1:
        yield f"factor is {factor:g}: below 1 it shortens the context"
    # What transformers takes where a file says nothing.
    slow, fast = rope.get("beta_slow") or 1, rope.get("beta_fast") or 32
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if fast < slow:
        yield f"beta_fast {fast:g} is below beta_slow {slow:g}: they seem to be exchanged"
    if low is not None and high is not None and high <= low:
        yield f"high_freq_factor {high:g} is not above low_freq_factor {low:g}"
    before, now = rope.get("original_max_position_embeddings"), config.get(_LENGTH)
    if rope.get("rope_type") == "llama3" and before and now and before >= now:
        yield f"original_max_position_embeddings {before} is not below {_LENGTH} {now}"
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if factors is not None and len(factors) != (wanted := _frequencies(rope, config)):
            yield f"{key} has {len(factors)} numbers for {wanted} frequencies"


def _frequencies(rope: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Frequencies of rotary embeddings in one head."""
    width = config.get("qk_rope_head_dim") or config.get("head_dim")
    width = width or config["hidden_size"] // config["num_attention_heads"]
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    return int(width * share) // 2


def _of_head(model: Model) -> Iterator[str]:
    if not model.stored_head_params:
        return
    names = [f"{part}.weight" for part in (model.family.lm_head, model.family.embedding)]
    head, embedding = (model.index.tensors[name] for name in names)
    if not same_sample(head, embedding):
        yield (
            f"{head.file}: {names[0]} has values of its own, and config.json says that it is the "
            "embedding (tie_word_embeddings): the stored head counts here, as in transformers; "
            "other programs may take the embedding"
        )
