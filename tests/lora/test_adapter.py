import json
import re
from pathlib import Path

import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.lora.adapter import CONFIG_NAME, LoraAdapter, LoraPair

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head")
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def write(directory: Path, ranks=(2, 2, 2), **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    pairs = {
        module: LoraPair(torch.ones(rank, 3), torch.ones(5, rank))
        for module, rank in zip(MODULES, ranks, strict=True)
    }
    LoraAdapter({**PLAIN, **config}, pairs).write(directory)
    return directory


def test_scaling(tmp_path: Path):
    assert LoraAdapter.read(write(tmp_path / "a")).scaling(MODULES[0]) == 2
    rooted = LoraAdapter.read(write(tmp_path / "b", use_rslora=True, r=2, lora_alpha=4))
    assert rooted.scaling(MODULES[0]) == 4 / 2**0.5


@pytest.mark.parametrize(
    "key", ["q_proj", "self_attn.q_proj", r"layers\.\d+\.self_attn\.q_proj", MODULES[0]]
)
def test_patterns_match_as_in_peft(key, tmp_path: Path):
    from peft.utils.other import get_pattern_key

    ranks = [4 if re.match(rf"(.*\.)?({key})$", module) else 2 for module in MODULES]
    patterns = {"rank_pattern": {key: 4}, "alpha_pattern": {key: 16}}
    adapter = LoraAdapter.read(write(tmp_path / "a", ranks, **patterns))
    for module in MODULES:
        rank = patterns["rank_pattern"].get(get_pattern_key([key], module), 2)
        alpha = patterns["alpha_pattern"].get(get_pattern_key([key], module), 4)
        assert adapter.scaling(module) == alpha / rank
    assert adapter.scaling(MODULES[0]) == 4 and adapter.scaling("lm_head") == 2


def test_a_part_of_a_name_is_no_match(tmp_path: Path):
    adapter = LoraAdapter.read(write(tmp_path / "a", alpha_pattern={"_proj": 16}))
    assert adapter.scaling(MODULES[0]) == 2


def test_of_several_patterns_the_first_counts(tmp_path: Path):
    patterns = {"q_proj": 16, MODULES[0]: 32}
    assert LoraAdapter.read(write(tmp_path / "a", alpha_pattern=patterns)).scaling(MODULES[0]) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True: only plain LoRA is supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"r": True}, "r is True, expected a whole number above 0"),
        ({"r": 0}, "r is 0, expected"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a finite number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "q_proj is nan, expected a finite number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern q_proj is 'x'"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern q_proj is 2.0, expected a whole"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern \(: not a pattern"),
        ({"rank_pattern": {"(a+)+b": 2}}, ".*could take without end"),
        ({"rank_pattern": {"(a|a)" * 30: 2}}, ".*could take without end"),
        ({"alpha_pattern": {"a?" * 20 + "a" * 20: 2}}, ".*could take without end"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected a mapping"),
        ({"bias": None}, "bias is None: only plain LoRA is supported"),
        ({"use_bdlora": {}}, "use_bdlora is {}: only plain LoRA is supported"),
        ({"lora_dropout": 2}, "lora_dropout is 2, expected a number from 0 to 1"),
        ({"lora_dropout": "x"}, "lora_dropout is 'x', expected a number"),
        ({"lora_dropout": None}, "lora_dropout is None, expected a number"),
        ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
        ({"target_modules": 3}, "target_modules is 3, expected names or a pattern"),
        ({"exclude_modules": ["a", 3]}, r"exclude_modules is \['a', 3\], expected names"),
        ({"target_modules": "("}, r"target_modules '\(': not a pattern"),
        ({"target_modules": r"((\w|\.)*)*!"}, "target_modules .*could take without end"),
        ({"layers_pattern": ".*.*.*.*.*.*.*!"}, "layers_pattern .*could take without end"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform is \['0'\], expected whole"),
    ],
)
def test_what_recovery_cannot_carry_over_is_named(change, message, tmp_path: Path):
    directory = write(tmp_path / "a")
    (directory / CONFIG_NAME).write_text(json.dumps({**PLAIN, **change}))
    with pytest.raises(LoramError, match=rf"adapter_config\.json: {message}"):
        LoraAdapter.read(directory)


@pytest.mark.parametrize(
    "target",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        # As Unsloth writes it.
        r"(?:.*?(?:vision|language|text).*?(?:self_attn|mlp|ffn).*?(?:k_proj|v_proj|up_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|down_proj)))",
    ],
)
def test_modules_named_as_other_trainers_do_are_taken(target, tmp_path: Path):
    directory = write(tmp_path / "a")
    changes = {"target_modules": target, "layers_to_transform": [0, 1], "exclude_modules": None}
    (directory / CONFIG_NAME).write_text(json.dumps({**PLAIN, **changes}))
    assert LoraAdapter.read(directory).config["target_modules"] == target
