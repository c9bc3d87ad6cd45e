"""A tiny random Llama with a byte-level tokenizer."""

from pathlib import Path


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, "<pad>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    fast.save_pretrained(directory)


def make_base(directory: Path, seed: int = 0, **changes: object) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def llama_like_tokenizer(*, pad: bool):
    """Bytes as tokens, and a bos that it adds itself, like Llama's own; with or without a pad."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", *(["<pad>"] if pad else [])]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    padding = {"pad_token": "<pad>"} if pad else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **padding
    )


def make_adapter(pruned: Path, directory: Path) -> Path:
    """What ``train`` would write for a pruned model, with random factors."""
    import torch

    from loram_cli.checkpoint.index import CheckpointIndex
    from loram_cli.lora.adapter import LoraAdapter, LoraPair
    from loram_cli.runs.manifest import Manifest

    pairs = {}
    torch.manual_seed(0)
    for name, entry in CheckpointIndex.open(pruned).tensors.items():
        if "_proj" in name:
            rows, columns = entry.shape
            factors = LoraPair(torch.randn(2, columns), torch.randn(rows, 2))
            pairs[name.removesuffix(".weight")] = factors
    directory.mkdir()
    LoraAdapter({"peft_type": "LORA", "r": 2, "lora_alpha": 4}, pairs).write(directory)
    manifest = Manifest.read(pruned)
    made = {"stage": "train", "key": "k", "spec": {}, "inputs": {"source": {}}}
    Manifest(**made, base=manifest.base, keep=manifest.keep).write(directory)
    return directory
