from pathlib import Path

import pytest
from helpers.variants import VARIANTS, Variant

import loram_cli
from loram_cli.arch.registry import families, family_for
from loram_cli.arch.spec import Family
from loram_cli.checkpoint.index import CheckpointIndex, read_config
from loram_cli.errors import LoramError


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_shapes_are_those_of_the_checkpoint_that_transformers_writes(
    variant: Variant, tmp_path: Path
):
    variant.save(tmp_path)
    config = read_config(tmp_path)
    shapes = family_for(config, "test").tensor_shapes(config)
    if variant.stores_head:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    assert {n: e.shape for n, e in CheckpointIndex.open(tmp_path).tensors.items()} == shapes


def test_every_family_has_a_variant():
    tried = {variant.model_type for variant in VARIANTS}
    assert tried == {name for family in families() for name in family.model_types}


# What configs of a family have, and the class has no use without.
STATED = {
    "gpt_neo": {"attention_types": [[["global"], 1]]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
}


# What older tools left out of config.json means what the family's config class takes it for.
@pytest.mark.parametrize("family", families(), ids=lambda f: f.family)
@pytest.mark.parametrize("absent", ["tie_word_embeddings", "head_dim", "num_key_value_heads"])
def test_absent_keys_mean_what_transformers_takes_them_for(family: Family, absent: str):
    import torch
    import transformers

    config = {
        "model_type": family.model_types[0], "vocab_size": 64, "hidden_size": 320,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 10, "tie_word_embeddings": False,
        "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    config |= family.requires | STATED.get(family.family, {})
    if family.layer_kinds is not None and family.layer_kinds.keys:
        named = [m for m in family.modules if m.kinds]
        kind = next((m.kinds[0] for m in named if "query" in m.rows), named[0].kinds[0])
        config[family.layer_kinds.keys[0]] = [kind]
    for key in family.config_keys:
        config[family.config_keys[key]] = config.pop(key)
    for rule in family.config_rules:
        # Keys that configs of this family do not have.
        config = {k: v for k, v in config.items() if rule["when"] or k not in rule["set"]}
    config.pop(family.config_keys.get(absent, absent), None)
    if (family.family, absent) == ("helium", "head_dim"):
        pytest.skip(
            "transformers' own model does not run: its output projection is hidden x hidden"
        )
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**config)
            )
    except TypeError as error:
        assert "NoneType" in str(error)
        pytest.skip("transformers builds no model without the key")
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    stored = model.state_dict().keys()
    buffers = {n: tuple(b.shape) for n, b in model.named_buffers() if n in stored}
    shapes |= {name: shape for name, shape in buffers.items() if not family.is_ignored(name)}
    assert shapes == family.tensor_shapes(config)


@pytest.mark.parametrize(
    ("model_type", "near"), [("gpt2", "nearest: gptj"), ("rwkv7", r"\d\d are known")]
)
def test_unknown_model_type_names_the_nearest(model_type: str, near: str):
    with pytest.raises(LoramError, match=rf"'{model_type}' is not a known family \({near}") as said:
        family_for({"model_type": model_type}, "somewhere")
    assert "'loram inspect somewhere --family --out families/NAME.json' proposes" in said.value.hint


def test_the_page_of_families_lists_them_all():
    page = (Path(loram_cli.__file__).parent / "docs" / "families.md").read_text("utf-8")
    rows = [row.split("|")[1:3] for row in page.splitlines() if row.startswith("| `")]
    listed = [tuple(cell.strip() for cell in row) for row in rows]
    expected = [(f"`{f.family}`", ", ".join(f"`{t}`" for t in f.model_types)) for f in families()]
    assert listed == expected


def test_an_unknown_multimodal_model_is_refused_with_the_way_out(tmp_path: Path):
    """The hint's own code is run, and must give the text model that it speaks of."""
    import torch
    import transformers

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.VipLlavaConfig(
        text_config={"model_type": "llama", **text}, vision_config=vision, image_token_index=60,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = transformers.VipLlavaForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(LoramError) as caught:
        family_for(read_config(tmp_path / "whole"), str(tmp_path / "whole"))
    said = caught.value.message
    assert "'vipllava' is a multimodal model around a 'llama' text model" in said
    assert "\n" not in said
    code = caught.value.hint.partition("pass that: ")[2]
    exec(code.replace("'TEXT'", repr(str(tmp_path / "text"))), {})
    saved = read_config(tmp_path / "text")
    assert family_for(saved, "text").family == "llama"
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, whole(input_ids=ids).logits)
