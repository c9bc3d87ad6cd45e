import pytest
import torch
from helpers.gguf_files import permuted

from loram_cli.arch.registry import families
from loram_cli.errors import LoramError
from loram_cli.export.gguf_names import (
    GgufNames,
    LayerHeads,
    contiguous_order,
    family_for_gguf,
    gguf_facts,
    rotary_order,
)
from loram_cli.lora.adapter import LoraPair

# Those that llama.cpp knows, as far as their files say.
FAMILIES = {family.family: family for family in families() if family.gguf is not None}
CONFIG = {
    "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "vocab_size": 64,
}  # fmt: skip


def names(family: str, layers: int = 3) -> GgufNames:
    return GgufNames(FAMILIES[family], (LayerHeads(4, 2),) * layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_module_has_a_name_of_its_own(family):
    modules = [n.removesuffix(".weight") for n in FAMILIES[family].linear_names(CONFIG)]
    found = [names(family).tensor(m) for m in modules]
    assert len(set(found)) == len(modules)
    assert all(n.startswith("blk.") and n.endswith(".weight") for n in found)


# Their heads are tied in llama.cpp, whatever the checkpoint says.
ALWAYS_TIED = {"cohere", "cohere2", "gemma", "gemma2"}


@pytest.mark.parametrize("family", sorted({*FAMILIES} - ALWAYS_TIED))
def test_the_head_has_a_name(family):
    assert names(family).tensor(FAMILIES[family].lm_head) == "output.weight"


@pytest.mark.parametrize("family", sorted(ALWAYS_TIED))
def test_a_head_that_llama_cpp_always_ties_is_refused(family):
    with pytest.raises(LoramError, match="adapter module lm_head: no such tensor"):
        names(family).tensor("lm_head")


def test_the_names_are_llama_cpps():
    of_it = names("llama")
    assert of_it.tensor("model.layers.2.self_attn.q_proj") == "blk.2.attn_q.weight"
    assert of_it.tensor("model.layers.0.mlp.down_proj") == "blk.0.ffn_down.weight"
    assert names("phi3").tensor("model.layers.1.mlp.gate_up_proj") == "blk.1.ffn_up.weight"


@pytest.mark.parametrize(
    "module", ["model.layers.3.self_attn.q_proj", "model.layers.0.mlp.other", "score"]
)
def test_an_unknown_module_is_refused(module):
    with pytest.raises(LoramError, match=rf"adapter module {module}: no such tensor"):
        names("llama").tensor(module)


def test_families_that_share_an_architecture_agree():
    for family in FAMILIES.values():
        assert gguf_facts(family_for_gguf(gguf_facts(family).architecture, "")) == family.gguf


def test_a_family_whose_file_does_not_speak_of_gguf_is_refused():
    unknown = next(family for family in families() if family.gguf is None)
    with pytest.raises(LoramError, match=f"'{unknown.family}' is not known in GGUF files"):
        gguf_facts(unknown)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(LoramError, match=r"x.gguf: architecture 'rwkv7' is not a known family"):
        family_for_gguf("rwkv7", "x.gguf")


@pytest.mark.parametrize(("rows", "heads"), [(64, 4), (24, 3), (8, 1)])
def test_rows_go_where_the_converter_puts_them(rows, heads):
    weight = torch.randn(rows, 5)
    assert torch.equal(weight[rotary_order(rows, heads)], permuted(weight, heads))


def test_only_rotated_rows_of_b_move():
    pair = LoraPair(torch.randn(2, 8), torch.randn(64, 2))
    query = names("llama").reordered("model.layers.0.self_attn.q_proj", pair)
    assert torch.equal(query.lora_b, permuted(pair.lora_b, 4))
    key = names("mistral").reordered("model.layers.0.self_attn.k_proj", pair)
    assert torch.equal(key.lora_b, permuted(pair.lora_b, 2))
    assert query.lora_a is pair.lora_a
    for family, module in (("llama", "self_attn.v_proj"), ("qwen3", "self_attn.q_proj")):
        assert names(family).reordered(f"model.layers.0.{module}", pair) is pair


@pytest.mark.parametrize(("query", "key_value"), [(4, 2), (4, 4), (4, 1)])
def test_fused_rows_go_where_the_converters_put_them(query, key_value):
    width = 6
    weight = torch.randn((query + 2 * key_value) * width, 5)
    # In the converter's own words, of Falcon; GPT-NeoX is the case of as many keys as queries.
    qkv = weight.view(key_value, query // key_value + 2, width, 5)
    q = qkv[:, :-2].reshape(query * width, 5)
    k = qkv[:, [-2]].reshape(key_value * width, 5)
    v = qkv[:, [-1]].reshape(key_value * width, 5)
    order = contiguous_order(len(weight), [query, key_value, key_value])
    assert torch.equal(weight[order], torch.cat((q, k, v)))


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("falcon", "transformer.h.1.self_attention.query_key_value"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"),
    ],
)
def test_fused_factors_are_made_contiguous(family, module):
    pair = LoraPair(torch.randn(2, 32), torch.randn(8 * 8, 2))
    found = names(family).reordered(module, pair)
    assert torch.equal(found.lora_b, pair.lora_b[contiguous_order(64, [4, 2, 2])])
    assert not torch.equal(found.lora_b, pair.lora_b)
    short = LoraPair(torch.randn(2, 32), torch.randn(8 * 8 + 2, 2))
    with pytest.raises(LoramError, match="66 rows do not make 8 heads"):
        names(family).reordered(module, short)


@pytest.mark.parametrize("family", ["arcee", "granite", "ministral3", "olmo", "smollm3"])
def test_descendants_of_llama_are_permuted_as_it_is(family):
    pair = LoraPair(torch.randn(2, 8), torch.randn(64, 2))
    query = names(family).reordered("model.layers.0.self_attn.q_proj", pair)
    assert torch.equal(query.lora_b, permuted(pair.lora_b, 4))


@pytest.mark.parametrize("family", ["cohere", "ernie4_5", "glm4", "olmo2", "starcoder2"])
def test_families_that_rotate_as_llama_cpp_does_keep_their_rows(family):
    pair = LoraPair(torch.randn(2, 8), torch.randn(64, 2))
    assert names(family).reordered("model.layers.0.self_attn.q_proj", pair) is pair


def test_heads_of_odd_width_are_refused():
    pair = LoraPair(torch.randn(2, 8), torch.randn(12, 2))
    with pytest.raises(LoramError, match="12 rows do not make 4 heads of even width"):
        names("llama").reordered("model.layers.0.self_attn.q_proj", pair)
