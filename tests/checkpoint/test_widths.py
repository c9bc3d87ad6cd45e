import pytest

from loram_cli.checkpoint.widths import check_required, check_widths
from loram_cli.errors import LoramError

SOUND = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 258,
    "head_dim": None,
    "per_layer_config": {"1": {"intermediate_size": 20}},
}


def test_what_is_sound_passes():
    check_widths(SOUND, "config.json")
    check_required(SOUND, "config.json")
    check_widths({}, "config.json")
    check_required({"model_type": "somebody's"}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 10**5000},
            "hidden_size is a number of many digits, expected a whole number",
        ),
        ({"num_hidden_layers": 10**9}, "expected a whole number from 1 to 10000"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ({"model_type": ["llama"]}, "model_type is no name"),
        ({"per_layer_config": [1]}, "per_layer_config is no mapping"),
        ({"per_layer_config": {"4": {}}}, "no sound entry '4'"),
        ({"per_layer_config": {"x": {}}}, "no sound entry"),
        ({"per_layer_config": {"9" * 5000: {}}}, "no sound entry"),
        ({"per_layer_config": {"\u0661": {}}}, "no sound entry"),
        ({"low_rank": 3}, r"low_rank is no mapping \(3\)"),
        ({"low_rank": {"1": 3}}, "low_rank has no sound entry '1'"),
        ({"low_rank": {"1": {"mlp.up_proj": "4"}}}, "low_rank 1: 'mlp.up_proj' has rank '4', exp"),
        ({"per_layer_config": {"1": {"intermediate_size": "no"}}}, "per_layer_config 1: inter"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(LoramError, match=rf"^config\.json: .*{message}"):
        check_widths({**SOUND, **change}, "config.json")


def test_a_known_family_needs_its_widths():
    lacking = {key: value for key, value in SOUND.items() if key != "vocab_size"}
    with pytest.raises(LoramError, match="has no vocab_size"):
        check_required(lacking, "config.json")
