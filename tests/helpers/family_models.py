"""A small random model of any family, and token windows for it."""

import importlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from helpers.slow import slow
from loram_cli.arch.registry import families
from loram_cli.arch.spec import Family

SAMPLES, LENGTH = 5, 24
SMALL = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


# Families whose configs name the plain widths and whose layers are alike; what the others are about
# is tried on models of their own (``variants.py``).
PLAIN_FAMILIES = tuple(
    family
    for family in families()
    if family.layer_kinds is None
    and family.attributes is None
    and family.experts is None
    and not family.config_keys
)


# Tests that run a model of every family send these through the default tier, and all others through
# the slow one.
DISTINCT_FAMILIES = ("llama", "gemma3", "phi3", "falcon")


def mostly_slow_families(families: Iterable[Family] = PLAIN_FAMILIES) -> pytest.MarkDecorator:
    """Parametrize ``family``: those of DISTINCT_FAMILIES plain, all others behind the slow marker."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(f, id=f.family)
            if f.family in DISTINCT_FAMILIES
            else slow(f, name=f.family)
            for f in families
        ],
    )


def make_model(family, directory: Path, dtype=torch.float32, **changes) -> Path:
    model_class = getattr(importlib.import_module("transformers"), family.architecture)
    torch.manual_seed(3)
    model = model_class(model_class.config_class(**{**SMALL, **changes}))
    for parameter in model.parameters():
        # Norms and biases away from one and zero, so that they matter.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(directory)
    return directory


def windows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 258, (SAMPLES, LENGTH), generator=generator)
