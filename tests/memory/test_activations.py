"""The activation account against tensors counted in real models on the CPU."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.checkpointing import enable_checkpointing
from helpers.family_models import PLAIN_FAMILIES, mostly_slow_families
from helpers.tensor_storage import LiveStorage, SavedTensors

from loram_cli.arch.registry import family_for
from loram_cli.memory.activations import activations
from loram_cli.memory.setup import TrainingSetup
from loram_cli.modeling.chunked_loss import chunked_loss
from loram_cli.modeling.random_model import random_causal_lm
from loram_cli.training.adapters import attach_lora, lora_config

pytestmark = pytest.mark.integration

CONFIG = {
    "model_type": "llama", "vocab_size": 900, "hidden_size": 128, "intermediate_size": 344,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
}  # fmt: skip
NARROW = {
    "1": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "intermediate_size": 96,
    }
}
SETUP = TrainingSetup(
    rank=4, micro_batch=2, length=96, cross_entropy="full", device="cpu", precision="bf16"
)


def build(setup, config):
    family = family_for(config, "test")
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    model = random_causal_lm(
        family,
        config,
        dtype=dtype,
        device="cpu",
        attention=setup.attention,
        nf4=setup.quantize == "nf4",
    )
    targets = [*family.lora_targets, family.lm_head_target]
    model = attach_lora(
        model, lora_config(targets, rank=setup.rank, dropout=setup.dropout), seed=0
    ).train()
    model.config.use_cache = False
    if setup.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def batch(setup):
    torch.manual_seed(0)
    ids = torch.randint(2, CONFIG["vocab_size"], (setup.micro_batch, setup.length))
    labels, mask = ids.clone(), torch.ones_like(ids)
    if setup.padded:
        mask[0, 60:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def forward(model, setup, inputs):
    chunks = setup.cross_entropy == "chunked"
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16")
    with chunked_loss(model) if chunks else nullcontext(), bf16:
        return model(**inputs).loss


def case(**changes):
    return pytest.param(
        replace(SETUP, **changes), id="-".join(f"{k}={v}" for k, v in changes.items())
    )


CASES = [
    case(attention=attention, gradient_checkpointing=checkpointing)
    for attention in ("sdpa", "eager")
    for checkpointing in (False, True)
] + [
    case(padded=False),
    case(dropout=0.0),
    case(precision="fp32"),
    case(precision="fp32", attention="eager", dropout=0.0),
    case(precision="fp32", gradient_checkpointing=True),
    case(cross_entropy="chunked"),
    case(cross_entropy="chunked", gradient_checkpointing=True),
    case(quantize="nf4"),
    case(quantize="nf4", gradient_checkpointing=True, cross_entropy="chunked"),
]  # fmt: skip


@pytest.mark.parametrize("setup", CASES)
@pytest.mark.parametrize("narrow", [False, True])
def test_predicted_bytes_are_those_that_autograd_saves(setup, narrow):
    if setup.quantize:
        pytest.importorskip("bitsandbytes")
    config = {**CONFIG, "per_layer_config": NARROW} if narrow else CONFIG
    model = build(setup, config)
    with SavedTensors(model) as saved:
        forward(model, setup, batch(setup))
    predicted = activations(family_for(config, "test"), config, setup).saved
    assert predicted == pytest.approx(saved.num_bytes, rel=0.02)


@pytest.mark.parametrize("setup", CASES)
def test_predicted_peak_is_the_highest_mark_of_live_storage(setup):
    if setup.quantize:
        pytest.importorskip("bitsandbytes")
    model = build(setup, CONFIG)
    inputs = batch(setup)
    forward(model, setup, inputs).backward()
    # Gradients are there already, as they are from the second micro-batch on.
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with LiveStorage(*known) as live:
        forward(model, setup, inputs).backward()
    predicted = activations(family_for(CONFIG, "test"), CONFIG, setup).peak
    assert predicted == pytest.approx(live.peak, rel=0.06)


# LayerNorms and parallel blocks keep other tensors than the account's; nanochat's norms have no
# weights, so that its file does not list them.
ROUGH = dict.fromkeys(("cohere", "cohere2", "jais2", "nemotron", "olmo", "phi", "starcoder2"), 0.1)
ROUGH["nanochat"] = 0.26
# Dropout on the residuals; no sdpa kernel; hidden and head widths that must agree.
NOT_COUNTED = {"seed_oss", "granite_swa", "helium"}


@mostly_slow_families(f for f in PLAIN_FAMILIES if f.family not in NOT_COUNTED)
def test_every_family_keeps_what_is_predicted(family):
    config = {
        **CONFIG, "model_type": family.model_types[0], "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 48, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }  # fmt: skip
    if family.family not in ("gemma2", "gemma3", "vaultgemma"):
        del config["attn_logit_softcapping"], config["final_logit_softcapping"]
    if family.family == "gemma3":
        config["attn_logit_softcapping"] = None
    if family.family == "apertus":
        config["hidden_act"] = "xielu"
    attention = "eager" if config.get("attn_logit_softcapping") else "sdpa"
    setup = replace(SETUP, attention=attention)
    model = build(setup, config)
    with SavedTensors(model) as saved:
        forward(model, setup, batch(setup))
    within = ROUGH.get(family.family, 0.02)
    assert activations(family, config, setup).saved == pytest.approx(saved.num_bytes, rel=within)


def test_more_tokens_and_full_logits_cost_more_and_checkpointing_less():
    family = family_for(CONFIG, "test")

    def peak(**changes):
        return activations(family, CONFIG, replace(SETUP, **changes)).peak

    assert peak(micro_batch=4) > peak() > peak(gradient_checkpointing=True)
    assert peak(length=192) > 1.9 * peak()
    assert peak(attention="eager", length=512) > peak(length=512)
    wide = {**CONFIG, "vocab_size": 128256}
    many = replace(SETUP, micro_batch=8)
    full = activations(family, wide, many)
    chunked = activations(family, wide, replace(many, cross_entropy="chunked"))
    assert full.logits == 4 * 128256 * many.tokens and chunked.logits == 0
    assert chunked.peak < full.peak / 4
    # A card keeps a dropout's mask in bytes, a CPU in numbers.
    assert peak(device="cuda") < peak(device="cpu")


def test_targets_that_are_left_out_keep_no_inputs():
    family = family_for(CONFIG, "test")
    some = replace(SETUP, targets=("q_proj", "v_proj"))
    model = random_causal_lm(family, CONFIG, dtype=torch.bfloat16, device="cpu")
    model = attach_lora(model, lora_config(some.targets, rank=4, dropout=0.05), seed=0).train()
    with SavedTensors(model) as saved:
        forward(model, some, batch(some))
    assert activations(family, CONFIG, some).saved == pytest.approx(saved.num_bytes, rel=0.02)
