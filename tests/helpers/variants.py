"""Tiny random models of every family, in every way that their configs can differ.

A new family adds its lines here, and one JSON file in ``loram_cli/arch/families``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
VARIANTS = (
    Variant("llama2", "llama", {"num_key_value_heads": 4}),
    Variant("llama3-tied", "llama", {**TIED, "rope_parameters": _LLAMA3_ROPE}),
    Variant("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Variant("llama-head-stored", "llama", TIED, stores_head=True),
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
)  # fmt: skip
