"""A tiny gpt-oss whose experts lie in MXFP4, as on the hub."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import save_tokenizer
from helpers.variants import MOE, Variant

# Whole blocks of 32 along both inputs.
TWIN = Variant("gpt_oss", "gpt_oss", {**MOE, "head_dim": 12, "intermediate_size": 64})
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def drawn(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of shape (*shape, 16) and exponents of a (*shape), around 2^-6."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(119, 124, shape, generator=generator).to(torch.uint8)
    return blocks, scales


def save_twins(directory: Path) -> tuple[Path, Path]:
    """The same weights twice: with experts in MXFP4, and as transformers expands these."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain, packed = (TWIN.save(directory / name) for name in ("plain", "packed"))
    weights = load_file(plain / "model.safetensors")
    small = dict(weights)
    for seed, (name, weight) in enumerate(sorted(weights.items())):
        if weight.dim() == 3:
            count, columns, rows = weight.shape
            blocks, scales = drawn(count, rows, columns // 32, seed=seed)
            weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=weight.dtype)
            del small[name]
            small |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(small, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZED}))
    return packed, plain


def save_large(directory: Path, *, packed: bool, width: int = 1024) -> int:
    """A gpt-oss in bf16 of three layers, 96 MiB of experts in each; the bytes of one's in bf16.

    With another ``width`` of an expert its share of that.
    """
    import transformers

    from loram_cli.arch.registry import family_for
    from loram_cli.checkpoint.index import read_config

    transformers.GptOssConfig(
        vocab_size=258, hidden_size=512, intermediate_size=width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=32,
        num_experts_per_tok=4, max_position_embeddings=256, dtype="bfloat16", pad_token_id=1,
        bos_token_id=0, eos_token_id=0,
    ).save_pretrained(directory)  # fmt: skip
    save_tokenizer(directory)
    config = read_config(directory)
    family = family_for(config, "large")
    experts, shapes = set(family.expert_names(config)), family.tensor_shapes(config)
    weights = {}
    torch.manual_seed(0)
    for name, shape in shapes.items():
        if packed and name in experts:
            blocks, scales = drawn(shape[0], shape[2], shape[1] // 32)
            weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            weights[name] = (torch.randn(shape) * 0.05).to(torch.bfloat16)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if packed:
        said = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(
            json.dumps({**said, "quantization_config": QUANTIZED})
        )
    return sum(2 * math.prod(shapes[name]) for name in experts) // 3
