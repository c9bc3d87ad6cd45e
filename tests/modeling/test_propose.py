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
    "deepseek_v2": "neither linear nor norm",
    "deepseek_v3": "neither linear nor norm",
    "ernie4_5_moe": "neither linear nor norm",
    "falcon": "attributes",
    "falcon_h1": "products of config keys",
    "glm4_moe": "neither linear nor norm",
    "glm4_moe_lite": "neither linear nor norm",
    "gpt_neox": "alternate",
    "gpt_oss": "neither linear nor norm",
    "granitemoehybrid": "no small causal LM",
    "helium": "as wide as the residual stream",
    "internlm3": "attention_bias cannot be on",
    "llama4": "neither linear nor norm",
    "minimax_m2": "neither linear nor norm",
    "mixtral": "neither linear nor norm",
    "nemotron_h": "products of config keys",
    "olmoe": "neither linear nor norm",
    "phi": "narrows as heads are added",
    "qwen2_moe": "neither linear nor norm",
    "qwen3_5": "products of config keys",
    "qwen3_5_moe": "neither linear nor norm",
    "qwen3_moe": "neither linear nor norm",
    "qwen3_next": "neither linear nor norm",
    "stablelm": "attributes",
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
        ambiguous = [m.name for m in family.modules if len(m.rows) > 1]
        assert [r.partition(":")[0] for r in remarks if "segments" in r] == ambiguous
        assert all("segments" in r or "neither linear nor norm" in r for r in remarks)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEYOND)
def test_what_the_modules_cannot_tell_is_said(name: str):
    family = next(f for f in families() if f.family == name)
    try:
        _, remarks = propose_family({"model_type": family.model_types[0]})
    except LoramError as error:
        remarks = [error.message]
    assert any(BEYOND[name] in remark for remark in remarks), remarks


def test_an_unknown_model_type_is_refused():
    with pytest.raises(LoramError, match="'no-such-thing': transformers builds no small causal LM"):
        propose_family({"model_type": "no-such-thing"})


def test_the_text_is_a_file_that_gives_the_same_family():
    import json

    data, _ = propose_family({"model_type": "cohere"})
    text = render_family(data)
    assert json.loads(text) == data
    assert max(map(len, text.splitlines())) < 120
