"""Family files that are proposed from transformers' modules, against the files that we have."""

from dataclasses import replace
from typing import Any

import pytest

from loram_cli.arch.registry import families
from loram_cli.arch.spec import ActivationKeeps, Family
from loram_cli.errors import LoramError
from loram_cli.modeling.propose import propose_family, render_family

# What a module tree cannot tell, or what a file says beyond it, by family.
BEYOND = {
    "afmoe": "neither linear nor norm",
    "biogpt": "attributes",
    "deepseek_v2": "neither linear nor norm",
    "deepseek_v3": "neither linear nor norm",
    "dots1": "no small causal LM",
    "ernie4_5_moe": "neither linear nor norm",
    "exaone_moe": "neither linear nor norm",
    "falcon": "attributes",
    "falcon_h1": "products of config keys",
    "flex_olmo": "neither linear nor norm",
    "glm4_moe": "neither linear nor norm",
    "glm4_moe_lite": "neither linear nor norm",
    "gpt_bigcode": "attributes",
    "gpt_neo": "no small causal LM",
    "gpt_neox": "attributes",
    "gpt_oss": "neither linear nor norm",
    "gptj": "attributes",
    "granitemoe": "neither linear nor norm",
    "granitemoehybrid": "no small causal LM",
    "helium": "as wide as the residual stream",
    "hunyuan_v1_moe": "neither linear nor norm",
    "internlm3": "attention_bias cannot be on",
    "lfm2": "products of config keys",
    "llama4": "neither linear nor norm",
    "mellum": "neither linear nor norm",
    "minimax_m2": "neither linear nor norm",
    "mixtral": "neither linear nor norm",
    "nemotron_h": "products of config keys",
    "olmoe": "neither linear nor norm",
    "opt": "attributes",
    "persimmon": "attributes",
    "phi": "narrows as heads are added",
    "phimoe": "neither linear nor norm",
    "qwen2_moe": "neither linear nor norm",
    "qwen3_5": "products of config keys",
    "qwen3_5_moe": "neither linear nor norm",
    "qwen3_moe": "neither linear nor norm",
    "qwen3_next": "neither linear nor norm",
    "solar_open": "neither linear nor norm",
    "stablelm": "attributes",
    "xglm": "fewer heads and channels does not run",
    "youtu": "products of config keys",
}
PLAIN = [family for family in families() if family.family not in BEYOND]
QUICK = ("llama", "gemma3", "phi3", "cohere", "granite", "hyperclovax", "starcoder2")


def meaning(family: Family) -> Family:
    """A family without its name, in an order that does not matter."""
    return replace(
        family,
        family="",
        model_types=(),
        ignored=(),
        # What other programs make of it, which transformers does not know.
        gguf=None,
        vllm=None,
        # What an activation keeps, and checks of config classes, which no module shows.
        activation_keeps=ActivationKeeps(),
        heads_stay=False,
        heads_stay_rope=(),
        modules=tuple(sorted(family.modules, key=lambda m: m.name)),
        layer_norms=tuple(sorted(family.layer_norms, key=lambda t: t.name)),
        layer_tensors=tuple(sorted(family.layer_tensors, key=lambda t: t.name)),
        norms=tuple(sorted(family.norms)),
    )


def fields(family: Family) -> dict[str, Any]:
    return {name: getattr(family, name) for name in Family.__dataclass_fields__}


@pytest.mark.parametrize(
    "family",
    [f if f.family in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in PLAIN],
    ids=lambda f: f.family,
)
def test_a_plain_family_is_proposed_as_its_file_has_it(family: Family):
    for model_type in family.model_types:
        data, remarks = propose_family({"model_type": model_type})
        assert fields(meaning(Family.from_data(data))) == fields(meaning(family))
        assert all("neither linear nor norm" in r for r in remarks)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEYOND)
def test_what_the_modules_cannot_tell_is_said(name: str):
    family = next(f for f in families() if f.family == name)
    try:
        _, remarks = propose_family({"model_type": family.model_types[0]})
    except LoramError as error:
        remarks = [error.message]
    assert any(BEYOND[name] in remark for remark in remarks), remarks


# Decoders that no file describes, and what a proposal for them cannot promise.
BROKEN = {
    "diffllama": "heads were not told apart",
    "codegen": "heads were not told apart",
    "bloom": "a layer with fewer heads and channels does not run",
    "mpt": "a layer with fewer heads and channels does not run",
    "gpt2": "such families are not supported",
    "modernbert-decoder": "its modules are not those of a plain decoder",
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", BROKEN)
def test_a_family_whose_heads_cannot_go_is_told(model_type: str):
    try:
        _, remarks = propose_family({"model_type": model_type})
    except LoramError as error:
        remarks = [error.message]
    assert any(BROKEN[model_type] in remark for remark in remarks), remarks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "persimmon", "opt", "gptj", "biogpt"])
def test_widths_and_order_are_told_where_heads_derive_from_the_config(name: str):
    """Beside the remark that 'attributes' were guessed; two LayerNorms of GPT-J lack the word."""
    family = next(f for f in families() if f.family == name)
    data, remarks = propose_family({"model_type": name})
    proposed = Family.from_data(data)
    assert all("attributes" in r or "neither linear nor norm" in r for r in remarks)
    config = {"model_type": name, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
              "num_hidden_layers": 2, "intermediate_size": 96}  # fmt: skip
    config = {family.config_keys.get(key, key): value for key, value in config.items()}
    assert proposed.tensor_shapes(config) == family.tensor_shapes(config)
    assert {m.name: m.interleaved for m in proposed.modules} == {
        m.name: m.interleaved for m in family.modules
    }


def test_an_unknown_model_type_is_refused():
    with pytest.raises(LoramError, match="'no-such-thing': transformers builds no small causal LM"):
        propose_family({"model_type": "no-such-thing"})


def test_the_text_is_a_file_that_gives_the_same_family():
    import json

    data, _ = propose_family({"model_type": "cohere"})
    text = render_family(data)
    assert json.loads(text) == data
    assert max(map(len, text.splitlines())) < 120
