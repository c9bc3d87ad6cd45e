import pytest

from loram_cli.checkpoint.config_values import (
    ACTIVATIONS,
    ROPE_TYPES,
    check_float_weights,
    check_values,
)
from loram_cli.errors import LoramError
from loram_cli.memory.presets import load_preset, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_published_configs_pass(name):
    check_values(load_preset(name), "config.json")
    check_float_weights(load_preset(name), "config.json")


def test_what_is_absent_or_null_is_not_asked_for():
    check_values({}, "config.json")
    check_values(
        {"rope_scaling": None, "sliding_window": None, "eos_token_id": None}, "config.json"
    )
    check_values({"eos_token_id": [1, 2], "pad_token_id": -1, "vocab_size": 8}, "config.json")
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    check_values({"rope_parameters": kinds, "dtype": "torch.bfloat16"}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number from 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected a mapping"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters: rope_theta is 'x'"),
        ({"rope_parameters": {"a": {"factor": 0}}}, "rope_parameters: a: factor is 0, expected"),
        ({"hidden_act": 5}, "hidden_act is 5, expected the name of an activation"),
        ({"hidden_activation": "gelou"}, "hidden_activation is 'gelou', expected the name of"),
        ({"rope_scaling": {"type": "yarm"}}, "rope_scaling: type is 'yarm', expected one of"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: kind 'linear' needs f"),
        ({"rope_scaling": {"a": {"type": "su", "short_factor": [1]}}}, ".*: a: .* needs long_fac"),
        ({"rope_parameters": {"short_factor": [1, "2"]}}, ".* expected a list of numbers above 0"),
        ({"dtype": "int4"}, "dtype is 'int4', expected a floating type"),
        ({"torch_dtype": {}}, "torch_dtype is {}"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token id"),
        ({"eos_token_id": [1, None]}, "eos_token_id is"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"max_position_embeddings": 10**5000}, "max_position_embeddings is a number of many"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"vocab_size": 8, "pad_token_id": 8}, "pad_token_id is 8, the model's vocabulary ends at"),
        ({"layer_types": "full"}, "layer_types is 'full', expected a list of names"),
    ],
)
def test_wrong_types_are_named(change, message):
    with pytest.raises(LoramError, match=rf"^config\.json: {message}"):
        check_values(change, "config.json")


def test_a_quantization_config_is_named():
    check_float_weights({"quantization_config": None}, "config.json")
    said = {"quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(LoramError, match=r"quantized \('bitsandbytes'\)\nfor float weights remove"):
        check_float_weights(said, "config.json")
    with pytest.raises(LoramError, match="compression_config"):
        check_float_weights({"compression_config": "fp8"}, "config.json")


def test_names_are_those_that_transformers_knows():
    """And a kind of rotary embedding needs what transformers refuses to miss."""
    from transformers import LlamaConfig
    from transformers.activations import ACT2CLS
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ACT2CLS) == ACTIVATIONS
    early = {"default", "axial", "mrope", "su"}
    assert set(ROPE_INIT_FUNCTIONS) == set(ROPE_TYPES) - early
    values = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values |= dict.fromkeys(("short_factor", "long_factor"), [1.0] * 64)
    for kind in ROPE_INIT_FUNCTIONS:
        whole = {key: values[key] for key in ROPE_TYPES[kind]}
        LlamaConfig(rope_parameters={"rope_type": kind, **whole}).validate_rope()
        for key in whole:
            less = {k: v for k, v in whole.items() if k != key}
            with pytest.raises(KeyError, match=key):
                LlamaConfig(rope_parameters={"rope_type": kind, **less}).validate_rope()
