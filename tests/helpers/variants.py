"""Tiny random models of every family, in every way that their configs can differ.

A new family adds its lines here, and one JSON file in ``loram_cli/arch/families``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.slow import slow
from helpers.tiny_models import save_tokenizer

TINY = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

# Half of each of eight head dimensions; all of them differ, so that an order that is lost shows.
_LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 128,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# A head width that is not hidden / heads, a scale of its own, a window shorter than the text.
_GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8}
# Falcon's own names of its widths; the plain ones would be stray keys.
_FALCON = {"ffn_hidden_size": 24, "num_kv_heads": 2, "new_decoder_architecture": True}
_NO_FALCON_KEYS = ("intermediate_size", "num_key_value_heads")

_LFM2 = {
    "block_auto_adjust_ff_dim": True, "block_multiple_of": 8,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}  # fmt: skip
# GPT's own names of widths.
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}
_NO_GPT_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "intermediate_size", "num_key_value_heads",
)  # fmt: skip
_NO_OPT_KEYS = ("intermediate_size", "num_key_value_heads")


def _spread_routers(model: Any) -> None:
    """Let routers choose clearly: near ties would fall differently in another order of sums."""
    import torch

    names = {name.rpartition(".")[0] for name, _ in model.named_modules() if ".experts" in name}
    for name, weights in model.named_parameters():
        block = name.rsplit(".", 2)[0]
        if block in names and weights.dim() == 2 and name.split(".")[-2] in ("gate", "router"):
            weights.data = torch.randn_like(weights)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.3)


@dataclass(frozen=True)
class Variant:
    """One tiny model.

    Attributes:
        name: For the test's id.
        model_type: As ``config.json`` states it.
        changes: What differs from ``TINY``.
        stores_head: Whether the file holds a head of its own although the config ties it;
            transformers then does not tie it.
        drops: Keys that are taken out of ``config.json``, where their default says the same.
        adds: Keys that published configs have on top.
    """

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    stores_head: bool = False
    drops: tuple[str, ...] = ()
    adds: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        """The model, its norms and biases random as well: their defaults would hide them."""
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            self.model_type, **{"tie_word_embeddings": False, **TINY, **self.changes}
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += torch.randn_like(parameter) * 0.3
        _spread_routers(model)
        return model

    def save(self, directory: Path) -> Path:
        """Write it as a checkpoint with a tokenizer."""
        import json

        from safetensors.torch import load_file, save_file

        self.model().save_pretrained(directory)
        save_tokenizer(directory)
        config = json.loads((directory / "config.json").read_text())
        config = {k: v for k, v in config.items() if k not in self.drops}
        (directory / "config.json").write_text(json.dumps({**config, **self.adds}))
        if self.stores_head:
            weights = load_file(directory / "model.safetensors")
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory


TIED = {"tie_word_embeddings": True}
# Six experts, of which a token has two: each family reads the names of the counts that it knows.
MOE = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2}
# Latent attention: every width differs, and every query head has a key/value head of its own.
_LATENT = {
    "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "num_key_value_heads": 4, "moe_intermediate_size": 16,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "first_k_dense_replace": 2,
}  # fmt: skip
_GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
# Linear attention in half of the layers, and a shared expert in all of them.
_LINEAR = {
    "head_dim": 12, "layer_types": ["linear_attention", "linear_attention", "full_attention",
                                    "full_attention"],
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
}  # fmt: skip
_SHARED_EXPERT = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 20}
VARIANTS = (
    Variant("llama2", "llama", {"num_key_value_heads": 4}),
    Variant("llama3-tied", "llama", {**TIED, "rope_parameters": _LLAMA3_ROPE}),
    Variant("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Variant("llama-head-stored", "llama", TIED, stores_head=True),
    Variant("llama4", "llama4_text", {
        "head_dim": 16, "intermediate_size_mlp": 40, "num_local_experts": 4,
        "no_rope_layers": [1, 1, 0, 1], "attention_chunk_size": 8}),
    Variant("llama4-dense-layers", "llama4_text", {
        "head_dim": 16, "intermediate_size_mlp": 40, "num_local_experts": 4,
        "interleave_moe_layer_step": 2}),
    Variant("mistral", "mistral", {"sliding_window": 8, "head_dim": 12}),
    Variant("qwen2", "qwen2"),
    Variant("qwen2-tied", "qwen2", TIED),
    Variant("qwen3", "qwen3", {"head_dim": 12, "attention_bias": True}),
    Variant("qwen3-tied", "qwen3", {**TIED, "head_dim": 12}),
    Variant("gemma2", "gemma2", {**_GEMMA, **TIED}, drops=("tie_word_embeddings",)),
    Variant("gemma2-untied", "gemma2", {**_GEMMA, "attention_bias": True}),
    Variant("gemma3", "gemma3_text", {**_GEMMA, **TIED, "sliding_window_pattern": 3}),
    Variant("gemma3-untied", "gemma3_text", {**_GEMMA, "attention_bias": True}),
    Variant("phi3", "phi3", {"sliding_window": 8},
            adds={"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}),
    Variant("phi3-long", "phi3", {"rope_parameters": _LONG_ROPE}),
    Variant("phi4-mini", "phi3",
            {**TIED, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                         "partial_rotary_factor": 0.5}}),
    Variant("afmoe", "afmoe", {
        **MOE, "moe_intermediate_size": 16, "head_dim": 12, "num_dense_layers": 2,
        "sliding_window": 8, "global_attn_every_n_layers": 2, "mup_enabled": True}),
    Variant("apertus", "apertus", {"head_dim": 12}),
    Variant("dots1", "dots1", {
        **MOE, **_GROUPS, "moe_intermediate_size": 16, "head_dim": 12, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "num_key_value_heads": 2}),
    Variant("exaone_moe", "exaone_moe", {
        **MOE, "moe_intermediate_size": 16, "head_dim": 12, "sliding_window": 8,
        "first_k_dense_replace": 2}),
    Variant("flex_olmo", "flex_olmo", MOE),
    Variant("gpt_bigcode", "gpt_bigcode", {**_GPT, "n_inner": 24}, drops=_NO_GPT_KEYS),
    Variant("gpt_neo", "gpt_neo", {
        "num_heads": 4, "num_layers": 4, "attention_types": [[["global", "local"], 2]],
        "window_size": 8}),
    Variant("gptj", "gptj", {**_GPT, "n_inner": 24, "rotary_dim": 4}, drops=_NO_GPT_KEYS),
    Variant("granitemoe", "granitemoe", {**MOE, "logits_scaling": 3.0, "head_dim": 12}),
    Variant("hunyuan_v1_moe", "hunyuan_v1_moe", {"num_experts": 6, "moe_topk": 2, "head_dim": 12}),
    Variant("lfm2", "lfm2", {**_LFM2, "intermediate_size": 24}),
    Variant("lfm2-rounded", "lfm2", {**_LFM2, "block_ff_dim": 50, "block_multiple_of": 10,
            "block_ffn_dim_multiplier": 1.1, "full_attn_idxs": [1, 2], "conv_bias": True,
            "layer_types": None}, drops=("layer_types",)),
    Variant("mellum", "mellum", {
        **MOE, "moe_intermediate_size": 16, "head_dim": 12, "sliding_window": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    Variant("opt", "opt", {
        "ffn_dim": 24, "word_embed_proj_dim": 32, "dropout": 0.0}, drops=_NO_OPT_KEYS),
    Variant("persimmon", "persimmon"),
    Variant("persimmon-plain", "persimmon", {"qk_layernorm": False}),
    Variant("phimoe", "phimoe", {
        **MOE, "router_jitter_noise": 0.0, "attention_bias": True, "lm_head_bias": True}),
    Variant("phimoe-plain", "phimoe", {**MOE, "router_jitter_noise": 0.0}),
    Variant("solar_open", "solar_open", {
        **MOE, "n_routed_experts": 6, "moe_intermediate_size": 16, "head_dim": 12}),
    Variant("xglm", "xglm", {
        "d_model": 32, "ffn_dim": 24, "num_layers": 4, "attention_heads": 4, "dropout": 0.0,
        "attention_dropout": 0.0}, drops=_NO_GPT_KEYS[:3] + _NO_GPT_KEYS[4:]),
    Variant("youtu", "youtu", {k: v for k, v in _LATENT.items() if "expert" not in k}),
    Variant("arcee", "arcee", {"mlp_bias": True}),
    Variant("biogpt", "biogpt", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            drops=("num_key_value_heads",)),
    Variant("cohere", "cohere", {**TIED, "use_qk_norm": True}),
    Variant("cohere-plain", "cohere", {"attention_bias": True}),
    Variant("cohere2", "cohere2", {**TIED, "sliding_window": 8}),
    Variant("cwm", "cwm", {"head_dim": 12, "sliding_window": 8}),
    Variant("deepseek_v2", "deepseek_v2", {**_LATENT, "norm_topk_prob": False}),
    Variant("deepseek_v2-lite", "deepseek_v2", {
        **_LATENT, **_GROUPS, "q_lora_rank": None, "topk_method": "group_limited_greedy",
        "attention_bias": True, "mlp_bias": True}),
    Variant("deepseek_v3", "deepseek_v3", {
        **_LATENT, **_GROUPS, "num_nextn_predict_layers": 1, "attention_bias": True}),
    Variant("deepseek_v3-whole", "deepseek_v3", {
        **_LATENT, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": 2}),
    Variant("ernie4_5", "ernie4_5", {"head_dim": 12, "use_bias": True}),
    Variant("ernie4_5_moe", "ernie4_5_moe", {
        **TIED, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16}),
    Variant("ernie4_5_moe-untied", "ernie4_5_moe", {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "head_dim": 12,
        "moe_layer_end_index": 2}),
    Variant("exaone4", "exaone4", {"head_dim": 12, "sliding_window": 8}),
    Variant("falcon", "falcon", _FALCON, drops=_NO_FALCON_KEYS),
    Variant("falcon-7b", "falcon", {**_FALCON, "new_decoder_architecture": False},
            drops=_NO_FALCON_KEYS),
    Variant("falcon-11b", "falcon", {**_FALCON, "num_ln_in_parallel_attn": 1, "bias": True},
            drops=_NO_FALCON_KEYS),
    Variant("falcon-sequential", "falcon",
            {**_FALCON, "new_decoder_architecture": False, "multi_query": False,
             "parallel_attn": False, "num_kv_heads": 4}, drops=_NO_FALCON_KEYS),
    Variant("falcon_h1", "falcon_h1", {
        "head_dim": 12, "lm_head_multiplier": 0.5, "key_multiplier": 0.7, "mamba_n_heads": 4,
        "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_chunk_size": 8}),
    Variant("gemma", "gemma", {**TIED, "head_dim": 12}),
    Variant("glm", "glm", {"head_dim": 12, "pad_token_id": 1}),
    Variant("glm4", "glm4", {"head_dim": 12, "attention_bias": False}),
    Variant("glm4_moe", "glm4_moe", {
        **MOE, "n_routed_experts": 6, "moe_intermediate_size": 16, "head_dim": 12,
        "use_qk_norm": True, "attention_bias": True}),
    Variant("glm4_moe-groups", "glm4_moe", {
        **MOE, "n_routed_experts": 8, "moe_intermediate_size": 16, "head_dim": 12, "n_group": 2,
        "topk_group": 1, "n_shared_experts": 2}),
    Variant("glm4_moe_lite", "glm4_moe_lite", {
        **_LATENT, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}),
    Variant("gpt_oss", "gpt_oss", {**MOE, "head_dim": 12, "sliding_window": 8}),
    Variant("gpt_neox", "gpt_neox"),
    Variant("gpt_neox-sequential", "gpt_neox",
            {"use_parallel_residual": False, "attention_bias": False}),
    Variant("granite", "granite", {"logits_scaling": 4.0, "residual_multiplier": 0.3,
                                   "embedding_multiplier": 6.0, "attention_multiplier": 0.2}),
    Variant("granite_swa", "granite_swa", {**TIED, "head_dim": 12, "sliding_window": 8}),
    Variant("granitemoehybrid", "granitemoehybrid", {
        "layer_types": ["linear_attention", "linear_attention", "full_attention",
                        "full_attention"], "shared_intermediate_size": 24, "mamba_n_heads": 8,
        "num_local_experts": 0, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "logits_scaling": 3.0}, drops=("intermediate_size",)),
    Variant("helium", "helium", {"head_dim": 8}),
    Variant("hunyuan_v1_dense", "hunyuan_v1_dense", {"head_dim": 12}),
    Variant("hyperclovax", "hyperclovax", {"logits_scaling": 0.5, "head_dim": 12}),
    Variant("hyperclovax-plain", "hyperclovax", {"use_post_norm": False}),
    Variant("internlm3", "internlm3", {"head_dim": 12}),
    Variant("iquestcoder", "iquestcoder", {"head_dim": 12}),
    Variant("jais2", "jais2", {"head_dim": 12}),
    Variant("minimax_m2", "minimax_m2", {**MOE, "head_dim": 12}),
    Variant("ministral", "ministral", {"head_dim": 12, "sliding_window": 8}),
    Variant("ministral3", "ministral3", {"head_dim": 12}),
    Variant("mixtral", "mixtral", MOE),
    Variant("mixtral-window", "mixtral", {**MOE, "sliding_window": 8, "head_dim": 12}),
    Variant("nanochat", "nanochat"),
    Variant("nemotron", "nemotron", {"head_dim": 12}),
    Variant("nemotron_h", "nemotron_h", {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "head_dim": 12,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8,
        "chunk_size": 8}),
    Variant("olmo", "olmo"),
    Variant("olmo2", "olmo2"),
    Variant("olmoe", "olmoe", MOE),
    Variant("olmo3", "olmo3", {"sliding_window": 8}),
    Variant("phi", "phi"),
    Variant("qwen2_moe", "qwen2_moe", {
        **MOE, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20,
        "norm_topk_prob": True}),
    Variant("qwen2_moe-dense-layers", "qwen2_moe", {
        **MOE, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [1]}),
    Variant("qwen3_moe", "qwen3_moe", {
        **MOE, "moe_intermediate_size": 16, "head_dim": 12, "norm_topk_prob": True}),
    Variant("qwen3_moe-dense-layers", "qwen3_moe", {
        **MOE, "moe_intermediate_size": 16, "head_dim": 12, "decoder_sparse_step": 2}),
    Variant("qwen3_5", "qwen3_5_text", _LINEAR),
    Variant("qwen3_5_moe", "qwen3_5_moe_text", {**MOE, **_LINEAR, **_SHARED_EXPERT},
            drops=("intermediate_size",)),
    Variant("qwen3_next", "qwen3_next", {**MOE, **_LINEAR, **_SHARED_EXPERT}),
    Variant("seed_oss", "seed_oss", {
        "head_dim": 12, "attention_out_bias": True, "attention_dropout": 0.0}),
    Variant("smollm3", "smollm3", {**TIED, "no_rope_layers": [1, 0, 1, 0]}),
    Variant("stablelm", "stablelm", {"use_qkv_bias": True}),
    Variant("stablelm-parallel", "stablelm", {"use_parallel_residual": True}),
    Variant("starcoder2", "starcoder2", {**TIED, "sliding_window": 8}),
    Variant("starcoder2-plain", "starcoder2", {"use_bias": False}),
    Variant("vaultgemma", "vaultgemma", {**_GEMMA, **TIED}),
)  # fmt: skip

# What differs most: tests that run a model of every family send these through the default tier,
# and all others through the slow one.
DISTINCT = ("llama2", "gemma3", "phi3", "falcon", "qwen3_5")


def mostly_slow(variants: Iterable[Variant] = VARIANTS) -> pytest.MarkDecorator:
    """Parametrize ``variant``: those of DISTINCT plain, all others behind the slow marker."""
    return pytest.mark.parametrize(
        "variant",
        [
            pytest.param(v, id=v.name) if v.name in DISTINCT else slow(v, name=v.name)
            for v in variants
        ],
    )
