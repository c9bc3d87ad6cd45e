"""Tiny GGUF models, made from Hugging Face directories by the package's own writer."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

from loram_cli.arch.registry import family_for
from loram_cli.export.gguf_file import GgufFile, PlannedTensor, padding, write_header
from loram_cli.export.gguf_names import GgufNames, LayerHeads
from loram_cli.export.gguf_types import decode, encode
from loram_cli.lora.adapter import LoraAdapter, LoraPair

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
# Bytes as GPT-2 spells them, and one pair of them: a byte-level vocabulary of 259.
TOKENS = ["<eos>", "<pad>", *sorted(ByteLevel.alphabet()), "th"]
NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}


def make_model(directory: Path, model_type: str = "llama", **changes: object) -> Path:
    """A tiny random model, its widths whole numbers of GGUF's blocks of 32."""
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def make_adapter(model: Path, directory: Path, *, head: bool = True, **config: object) -> Path:
    """A LoRA of random factors of rank 2 on every linear module, its config as PEFT writes it."""
    values = json.loads((model / "config.json").read_text())
    family = family_for(values, "")
    tied = values["tie_word_embeddings"]
    shapes = family.tensor_shapes(values)
    wanted = [n.removesuffix(".weight") for n in family.linear_names(values)]
    wanted += [family.lm_head] if head else []
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": False, **config}
    pairs = {}
    for module in wanted:
        name = f"{family.embedding if tied and module == family.lm_head else module}.weight"
        rank = config.get("rank_pattern", {}).get(module, config["r"])
        a, b = torch.randn(rank, shapes[name][1]), torch.randn(shapes[name][0], rank)
        pairs[module] = LoraPair(a / 30, b / 30)
    directory.mkdir()
    LoraAdapter(config, pairs).write(directory)
    return directory


def names_of(directory: Path) -> GgufNames:
    config = json.loads((directory / "config.json").read_text())
    family = family_for(config, "")
    layers = family.geometry(config).layers
    heads = (LayerHeads(g.num_attention_heads, g.num_key_value_heads) for g in layers)
    return GgufNames(family, tuple(heads))


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter writes it, in its own words."""
    shape = weight.shape
    halves = weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def gguf_weights(directory: Path) -> dict[str, torch.Tensor]:
    """A tiny model's weights in float32 under GGUF's names, in GGUF's order of rows."""
    names = names_of(directory)
    weights = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensor = tensor.float()
        if name == f"{names.family.embedding}.weight":
            weights["token_embd.weight"] = tensor
        elif name in names.family.norms:
            weights["output_norm.weight"] = tensor
        elif name == f"{names.family.lm_head}.weight":
            weights["output.weight"] = tensor
        else:
            layer, rest = name.removeprefix(f"{names.family.layers}.").split(".", 1)
            if rest in NORMS:
                weights[f"blk.{layer}.{NORMS[rest]}"] = tensor
                continue
            module, _, kind = name.rpartition(".")
            for part, heads in (("q_proj", "query"), ("k_proj", "key_value")):
                if f"{part}." in rest and names.family.gguf.architecture == "llama":
                    tensor = permuted(tensor, getattr(names.heads[int(layer)], heads))
            weights[names.tensor(module).removesuffix("weight") + kind] = tensor
    return weights


def write_gguf(directory: Path, out: Path, kind: Type = Type.F32, **metadata: int | str) -> Path:
    """A tiny model as a GGUF file: matrices of a type, vectors in float32.

    Args:
        directory: Of the model.
        out: The file.
        kind: Of its matrices.
        metadata: More texts and numbers (``general__file_type`` for ``general.file_type``).
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = names_of(directory).family.gguf.architecture
    writer = GGUFWriter(out, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *(1 for _ in TOKENS[2:])])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_bool("test.yes", True)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(key.replace("__", "."), value)
    for name, tensor in gguf_weights(directory).items():
        of_it = kind if tensor.dim() > 1 else Type.F32
        writer.add_tensor(name, quantize(tensor.numpy().astype(np.float32), of_it), raw_dtype=of_it)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def rewrite(base: Path, out: Path, *, alignment: int = 32, zeros: dict[str, Type] | None = None):
    """The same file with another alignment, or with some tensors zero and of another type."""
    file, raw = GgufFile.open(base), base.read_bytes()
    metadata, entries = file.metadata(), len(file.fields)
    if alignment != 32:
        key = b"general.alignment"
        metadata += struct.pack(f"<Q{len(key)}sII", len(key), key, 4, alignment)
        entries += 1
    kinds = {name: t.kind for name, t in file.tensors.items()} | (zeros or {})
    planned = [PlannedTensor(t.name, kinds[t.name], t.shape) for t in file.tensors.values()]
    with out.open("wb") as to:
        write_header(to, 3, metadata, entries, planned, alignment)
        for plan in planned:
            tensor = file.tensors[plan.name]
            own = raw[tensor.offset_bytes :][: tensor.num_bytes]
            to.write(bytes(plan.num_bytes) if plan.name in (zeros or {}) else own)
            to.write(bytes(padding(plan.num_bytes, alignment)))
    return out


def through(weight: torch.Tensor, kind: Type) -> torch.Tensor:
    """A weight after it was stored in a type."""
    return decode(encode(weight, kind, "test"), kind)
