"""A small random Llama with a byte-level tokenizer."""

import gzip
import json

import pytest
from helpers.tiny_models import llama_like_tokenizer

from loram_cli.quiet import no_progress_bars


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes as tokens, plus bos and eos; no pad token, like Llama's own."""
    return llama_like_tokenizer(pad=False)


@pytest.fixture(scope="session")
def tiny_config(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


@pytest.fixture
def model(tiny_config):
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_config)).eval()


@pytest.fixture
def stories(shared_file):
    import transformers

    folder = shared_file("models/stories260k")
    with no_progress_bars():
        return (
            transformers.AutoModelForCausalLM.from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder),
        )


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, records):
        text = "".join(json.dumps(record) + "\n" for record in records)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.fixture
def engine_of():
    """An engine over a model in memory."""

    def build(model, tokenizer, batch_size=None, cache=None):
        from loram_cli.evaluation.engine import Engine
        from loram_cli.evaluation.hugging_face import HuggingFaceBackend
        from loram_cli.evaluation.perplexity import context_length

        def backend():
            return HuggingFaceBackend(model, tokenizer, batch_size)

        return Engine(backend, tokenizer, context_length(model), cache)

    return build
