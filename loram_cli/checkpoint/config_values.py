"""Types and ranges of what a ``config.json`` says beside the widths.

transformers takes most of these keys unchecked, and fails on them deep inside a model. Keys that a
config does not have, or holds as null, are not asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loram_cli.checkpoint.header import DTYPES
from loram_cli.errors import LoramError

_LONGEST = 60
_HIGHEST = 2**31
_DTYPES = {dtype.torch_name for dtype in DTYPES.values() if dtype.is_floating_point} | {"auto"}


@dataclass(frozen=True)
class _Rule:
    """What keys must hold, in code and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < _HIGHEST


def _is_number(value: Any) -> bool:
    # NaN and infinity are refused where the file is read.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _are_tokens(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    # -1 is how early Llama files say that there is no padding.
    return all(_is_whole(token, -1) for token in ids)


_COUNT = _Rule(lambda value: _is_whole(value, 1), "a whole number above 0")
_WHOLE = _Rule(lambda value: _is_whole(value, 0), "a whole number from 0")
_TOKEN = _Rule(_are_tokens, "a token id")
_POSITIVE = _Rule(lambda value: _is_number(value) and value > 0, "a number above 0")
_NOT_NEGATIVE = _Rule(lambda value: _is_number(value) and value >= 0, "a number from 0")
_NUMBER = _Rule(_is_number, "a number")
_SHARE = _Rule(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_SWITCH = _Rule(lambda value: value in (0, 1), "true or false")
_NAME = _Rule(lambda value: isinstance(value, str) and 0 < len(value) < _HIGHEST, "a name")
_MAPPING = _Rule(lambda value: isinstance(value, Mapping), "a mapping")
_NAMES = _Rule(
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "a list of names",
)
# transformers' names of activations; a model with another cannot be built.
ACTIVATIONS = frozenset({
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python",
    "gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish",
    "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish",
    "tanh", "xielu",
})  # fmt: skip
# What a kind of rotary embedding cannot do without: transformers refuses a model that lacks it.
# Early names of a kind are among them, which some config classes still know.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (), "axial": (), "mrope": (), "proportional": (),
    "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"), "su": ("short_factor", "long_factor"),
}  # fmt: skip
_ACTIVATION = _Rule(
    lambda value: isinstance(value, str) and value in ACTIVATIONS,
    "the name of an activation, such as silu or gelu_pytorch_tanh",
)
_ROPE_TYPE = _Rule(
    lambda value: isinstance(value, str) and value in ROPE_TYPES,
    f"one of {', '.join(ROPE_TYPES)}",
)
_FACTORS = _Rule(
    lambda value: isinstance(value, list) and all(_is_number(item) and item > 0 for item in value),
    "a list of numbers above 0",
)
_DTYPE = _Rule(
    lambda value: isinstance(value, str) and value.removeprefix("torch.") in _DTYPES,
    "a floating type such as bfloat16",
)
_ROPE: dict[str, _Rule] = {
    "rope_theta": _POSITIVE,
    "factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "original_max_position_embeddings": _COUNT,
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(("mscale", "mscale_all_dim"), _NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), _FACTORS),
    "truncate": _SWITCH,
    **dict.fromkeys(("rope_type", "type"), _ROPE_TYPE),
}
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _COUNT),
    # Qwen2-MoE says by 0 that there is none.
    "sliding_window": _WHOLE,
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _TOKEN),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        ("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
         "final_logit_softcapping", "logits_scaling"),
        _POSITIVE,
    ),
    **dict.fromkeys(
        ("initializer_range", "logit_scale", "embedding_multiplier", "residual_multiplier",
         "attention_multiplier"),
        _NUMBER,
    ),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "partial_rotary_factor"), _SHARE),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "use_bias", "bias"),
        _SWITCH,
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation"), _ACTIVATION),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _MAPPING),
    **dict.fromkeys(("architectures", "layer_types"), _NAMES),
}  # fmt: skip


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Refuse values of another type, or out of the range that they can have.

    Raises:
        LoramError: Names file, key and value.
    """
    _check(config, _RULES, where)
    for place, rope in rotary_settings(config):
        _check(rope, _ROPE, f"{where}: {place}")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        for key in ROPE_TYPES[kind]:
            if rope.get(key) is None:
                raise LoramError(f"{where}: {place}: kind '{kind}' needs {key}, which is absent")
    pad, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(vocabulary, int) and pad >= vocabulary:
        raise LoramError(
            f"{where}: pad_token_id is {pad}, the model's vocabulary ends at {vocabulary - 1}"
        )


def rotary_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping of rotary settings, and its key.

    Where kinds of layer turn by their own frequencies, each has a mapping.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        inner = {kind: value for kind, value in rope.items() if isinstance(value, Mapping)}
        if not inner:
            yield key, rope
        for kind, value in inner.items():
            yield f"{key}: {kind}", value


def check_float_weights(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that says that the weights are quantized.

    Every stage reads floating weights, and what is made of them would be loaded as quantized.

    Raises:
        LoramError: It has a ``quantization_config``.
    """
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            said = config[key]
            method = short(said.get("quant_method") if isinstance(said, Mapping) else said)
            raise LoramError(
                f"{where}: {key} says that the weights are quantized ({method})",
                f"for float weights remove {key} from the file; else pass the original model: "
                "quantized weights cannot be pruned",
            )


def short(value: object) -> str:
    """A value as text that fits on a line."""
    # A huge integer cannot even be turned into text.
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _check(values: Mapping[str, Any], rules: Mapping[str, _Rule], where: str) -> None:
    for key, rule in rules.items():
        value = values.get(key)
        if value is not None and not rule.holds(value):
            raise LoramError(f"{where}: {key} is {short(value)}, expected {rule.words}")
