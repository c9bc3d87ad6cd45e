"""A small random Llama on disk, plain and with layers of different widths, and its tokenizer."""

import json
from contextlib import contextmanager

import pytest
from helpers.tiny_models import llama_like_tokenizer

NARROW_LAYER = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
}


class RecordingReporter:
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.warnings, self.details = [], [], []
        self.total, self.advanced = None, 0
        self.on_advance = lambda done: None

    def note(self, line):
        self.notes.append(line)

    def warn(self, line):
        self.warnings.append(line)

    @contextmanager
    def progress(self, label, total, unit="it"):
        self.total = total
        yield self

    def advance(self, steps=1):
        self.advanced += steps
        self.on_advance(self.advanced)

    def skip(self, steps):
        self.advanced += steps

    def detail(self, text):
        self.details.append(text)


@pytest.fixture
def reporter():
    return RecordingReporter()


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes as tokens, with a bos that it adds itself, like Llama's own."""
    return llama_like_tokenizer(pad=True)


@pytest.fixture(scope="session")
def make_model_dir(tokenizer, tmp_path_factory):
    """Write a random checkpoint; ``narrow`` makes layer 1 smaller."""

    def make(*, narrow=False, tied=False, hidden_size=32):
        import torch
        import transformers

        from loram_cli.arch.registry import family_for
        from loram_cli.modeling.load import narrow_class

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        path = tmp_path_factory.mktemp("model")
        if narrow:
            config.save_pretrained(path)
            plain = json.loads((path / "config.json").read_text())
            plain["per_layer_config"] = {"1": NARROW_LAYER}
            plain["allow_global_per_layer_attribute_access"] = True
            (path / "config.json").write_text(json.dumps(plain))
            config = transformers.AutoConfig.from_pretrained(path)
            model = narrow_class(family_for({"model_type": "llama"}, "test"))(config)
        else:
            model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def narrow_dir(make_model_dir):
    return make_model_dir(narrow=True)


@pytest.fixture
def load(narrow_dir):
    """The narrow model in fp32 on the CPU, fresh from disk."""
    import torch

    from loram_cli.modeling.load import load_causal_lm

    def load(path=narrow_dir, **kwargs):
        return load_causal_lm(path, **{"dtype": torch.float32, "device": "cpu", **kwargs})

    return load


@pytest.fixture
def with_lora(load):
    """The narrow model with LoRA on every linear and the head."""
    from loram_cli.arch.registry import family_for
    from loram_cli.reporting import NullReporter
    from loram_cli.training.adapters import attach_lora, lora_config, lora_targets

    def build(model=None, dropout=0.05):
        targets = lora_targets(
            family_for({"model_type": "llama"}, "test"),
            tied_embeddings=False,
            reporter=NullReporter(),
        )
        return attach_lora(model or load(), lora_config(targets, dropout=dropout), seed=3)

    return build


@pytest.fixture
def rows(tokenizer):
    """Sixteen short sums as token rows of different lengths."""
    from loram_cli.reporting import NullReporter
    from loram_cli.training.data.documents import Example
    from loram_cli.training.data.tokens import tokenize_examples

    sums = [Example(f"{a}+{a * b} is", f" {a + a * b}") for a in range(4) for b in range(2, 6)]
    return tokenize_examples(sums, tokenizer, 64, NullReporter())
