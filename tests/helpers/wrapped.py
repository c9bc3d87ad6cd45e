"""Tiny random multimodal models, whose language model is one of the families."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.tiny_models import save_tokenizer
from helpers.variants import TINY

_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
           "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                "patch_size": 4, "spatial_merge_size": 2, "out_hidden_size": 32,
                "num_position_embeddings": 16}  # fmt: skip
_KINDS = ["linear_attention", "linear_attention", "full_attention", "full_attention"]


@dataclass(frozen=True)
class Wrapped:
    """One tiny multimodal model.

    Attributes:
        model_type: Of the whole.
        text: What differs from ``TINY`` in the language model.
        vision: The vision tower's config.
        top: Of the whole.
    """

    model_type: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=lambda: _VISION)
    top: dict[str, Any] = field(default_factory=lambda: {"image_token_index": 10})

    def save(self, directory: Path) -> Path:
        """Write it as a checkpoint with a tokenizer, its norms and biases random as well."""
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            self.model_type, text_config={**TINY, **self.text}, vision_config=self.vision,
            **self.top,
        )  # fmt: skip
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += torch.randn_like(parameter) * 0.3
        model.save_pretrained(directory)
        save_tokenizer(directory)
        return directory


WRAPPED = (
    Wrapped("gemma3", {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8},
            top={"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61,
                 "eoi_token_index": 62}),
    Wrapped("mistral3", {"model_type": "mistral", "head_dim": 12},
            {**_VISION, "model_type": "pixtral"}),
    Wrapped("qwen3_5", {
        "head_dim": 12, "layer_types": _KINDS, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_num_value_heads": 4, "linear_value_head_dim": 8},
        _QWEN_VISION, {"tie_word_embeddings": False}),
    Wrapped("llava", {"model_type": "llama"}, {**_VISION, "model_type": "clip_vision_model"}),
    Wrapped("llava_next", {"model_type": "mistral", "head_dim": 12},
            {**_VISION, "model_type": "siglip_vision_model"}),
    Wrapped("llava_onevision", {"model_type": "qwen2"},
            {**_VISION, "model_type": "siglip_vision_model"}),
    Wrapped("internvl", {"model_type": "qwen3", "head_dim": 12},
            {**_VISION, "model_type": "internvl_vision", "image_size": [28, 28],
             "patch_size": [14, 14]}, {"image_token_id": 10}),
    Wrapped("idefics3", {"model_type": "llama"}, top={}),
    Wrapped("smolvlm", {"model_type": "llama"}, top={}),
)  # fmt: skip
