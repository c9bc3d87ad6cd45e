"""The chunked cross-entropy against the plain one: loss, gradients, and what autograd keeps."""

import pytest
import torch
from helpers.checkpointing import enable_checkpointing
from helpers.nf4 import nf4_model
from helpers.tiny_models import make_base
from helpers.variants import Variant, mostly_slow

from loram_cli.modeling.chunked_loss import (
    chunked_cross_entropy,
    chunked_loss,
    install_token_scores,
    restore_forward,
)
from loram_cli.modeling.load import load_causal_lm
from loram_cli.training.adapters import attach_lora, lora_config

TARGETS = ["q_proj", "down_proj", "lm_head"]


@pytest.fixture
def batch():
    torch.manual_seed(2)
    ids = torch.randint(2, 250, (3, 21))
    labels = ids.clone()
    labels[0, :9] = labels[1, 14:] = labels[2, :20] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def lora_model(base, *, nf4=False, targets=TARGETS):
    def attach(model):
        return attach_lora(model, lora_config(targets, dropout=0.0), seed=0).train()

    if nf4:
        model = nf4_model(base, attach)
    else:
        model = attach(load_causal_lm(base, dtype=torch.float32, device="cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return model


def gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_near(left, right):
    torch.testing.assert_close(left[0], right[0], rtol=1e-5, atol=1e-6)
    assert left[1].keys() == right[1].keys()
    for name in left[1]:
        torch.testing.assert_close(left[1][name], right[1][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("items", [None, torch.tensor(50)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_plain_ones(base, batch, nf4, items, checkpointing):
    if nf4:
        pytest.importorskip("bitsandbytes")
    model = lora_model(base, nf4=nf4)
    if checkpointing:
        enable_checkpointing(model)
    more = {} if items is None else {"num_items_in_batch": items}
    plain = gradients(model, batch, **more)
    with chunked_loss(model, chunk=4):
        chunked = gradients(model, batch, **more)
    assert any("lm_head" in name and g.abs().max() > 0 for name, g in chunked[1].items())
    assert_near(chunked, plain)
    assert_near(gradients(model, batch, **more), plain)


@mostly_slow()
def test_every_family_trained_whole(variant: Variant, tmp_path, batch):
    variant.save(tmp_path)
    model = load_causal_lm(tmp_path, dtype=torch.float32, device="cpu").train()
    batch = {**batch, "input_ids": batch["input_ids"] % 60 + 2}
    batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["input_ids"])
    # Some families drop out: both passes draw alike.
    torch.manual_seed(0)
    plain = gradients(model, batch)
    torch.manual_seed(0)
    with chunked_loss(model, chunk=7):
        assert_near(gradients(model, batch), plain)


def test_logits_are_never_whole_and_other_tokens_pass_no_head(base, batch):
    model = lora_model(base)
    vocabulary = model.config.vocab_size
    widths = []

    def seen(_module, _inputs, out):
        widths.append(out.shape[0])

    model.get_submodule("base_model.model.lm_head").register_forward_hook(seen)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    tokens = int((batch["labels"][:, 1:] != -100).sum())
    with chunked_loss(model, chunk=4):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**batch).loss
        assert sum(widths) == tokens and max(widths) == 4
        assert not [
            t for t in kept if t.dim() and t.shape[-1] == vocabulary and t.numel() > vocabulary * 8
        ]
        loss.backward()
    # Each chunk a second time, in the backward pass.
    assert sum(widths) == 2 * tokens


def test_a_batch_without_loss_gives_zeros_to_every_factor(base, batch):
    model = lora_model(base)
    batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with chunked_loss(model):
        loss, grads = gradients(model, batch, num_items_in_batch=torch.tensor(5))
    assert loss == 0
    assert all(g is not None and not g.any() for g in grads.values())


def test_without_labels_logits_come_as_ever(base, batch):
    model = lora_model(base).eval()
    with torch.no_grad():
        plain = model(input_ids=batch["input_ids"]).logits
        with chunked_loss(model):
            assert torch.equal(model(input_ids=batch["input_ids"]).logits, plain)
            assert model(**batch).loss > 0


def test_in_bf16_the_loss_is_fp32(batch):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias=False).bfloat16()
    hidden = torch.randn(3, 21, 16).bfloat16().requires_grad_()
    labels = batch["labels"]
    loss = chunked_cross_entropy(hidden, labels, head, chunk=5)
    assert loss.dtype == torch.float32
    plain = torch.nn.functional.cross_entropy(
        head(hidden[:, :-1]).float().flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)


def test_a_wide_vocabulary_passes_in_many_chunks(tmp_path, batch, monkeypatch):
    monkeypatch.setattr("loram_cli.memory.setup.CHUNK_LOGITS", 258 * 6)
    model = load_causal_lm(make_base(tmp_path), dtype=torch.float32, device="cpu").train()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    with chunked_loss(model), torch.no_grad():
        model(**batch)
    assert len(calls) == -(-tokens // 6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_scores_are_those_of_whole_logits_and_train_the_head(base, batch, temperature):
    model = lora_model(base)
    labels, inputs = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits[:, :-1] / temperature
    log_probs = logits.log_softmax(-1)
    wanted, scored = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    expected = log_probs.gather(-1, wanted[..., None])[..., 0] * scored
    (expected**2).sum().backward()
    gradients_before = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    install_token_scores(model, temperature=temperature, chunk=5)
    scores = model(**inputs, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(scores.log_probs, expected, rtol=1e-5, atol=1e-5)
    entropy = -(log_probs.exp() * log_probs).sum(-1) * scored
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.mean_logits, logits.mean(-1) * scored, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.is_top1, (logits.argmax(-1) == labels[:, 1:]) & scored)
    assert not scores.entropy.requires_grad
    (scores.log_probs**2).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients_before[name], rtol=1e-4, atol=1e-5)
    assert any("lm_head" in name for name in gradients_before)
    # Everything else is as it was, and so is the model once the scores are taken off.
    plain = model(**inputs).logits[:, :-1] / temperature
    torch.testing.assert_close(plain, logits)
    restore_forward(model)
    assert "forward" not in vars(model.get_base_model())
