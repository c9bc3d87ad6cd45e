"""Gradients of a model whose layers come and go, beside those of the same model resident."""

import gc
import json
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.fake_copies import FakeCopies
from helpers.nf4 import nf4_model
from helpers.slow import slow
from helpers.variants import VARIANTS, mostly_slow

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.index import read_config
from loram_cli.errors import LoramError
from loram_cli.modeling.chunked_loss import chunked_loss
from loram_cli.modeling.layerwise.lora_pass import streamed_lora
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import attach_lora, lora_config, lora_targets

SILENT = NullReporter()
FP32 = {"dtype": torch.float32, "device": "cpu"}


def micro_batches(count=3):
    """Of different lengths, longer than the sliding windows; the second carries no loss."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for m in range(count):
        ids = torch.randint(3, 250, (2, 20 + 3 * m), generator=generator)
        labels = ids.clone()
        labels[:, : 4 + m] = -100
        if m == 1:
            labels[:] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def with_factors(model, directory, dropout, targets=None):
    family = family_for(read_config(directory), "test")
    tied = family.geometry(read_config(directory)).tied_embeddings
    targets = lora_targets(family, tied_embeddings=tied, reporter=SILENT, targets=targets)
    model = attach_lora(model, lora_config(targets, rank=4, dropout=dropout), seed=3).train()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero would hide the gradients of the other factor
            parameter.data.normal_(std=0.02, generator=generator)
    model.config.use_cache = False
    return model


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found and all(gradient is not None for gradient in found.values())
    return found


def num_items(batches):
    return sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)


def resident(
    directory,
    batches,
    *,
    dropout=0.0,
    nf4=False,
    autocast=nullcontext,
    steps=1,
    attention=None,
):
    def attach(model):
        return with_factors(model, directory, dropout)

    if nf4:
        model = nf4_model(directory, attach, attention=attention)
    else:
        model = attach(load_causal_lm(directory, attention=attention, **FP32))
    torch.manual_seed(11)
    losses = []
    with chunked_loss(model, 7):
        for batch in batches * steps:
            with autocast():
                loss = model(**batch, num_items_in_batch=num_items(batches)).loss
            loss.backward()
            losses.append(loss.detach())
    return losses, gradients(model), torch.get_rng_state()


@contextmanager
def streamed(directory, *, dropout=0.0, nf4=False, targets=None, attention=None, **how):
    skeleton = SkeletonModel(directory, nf4=nf4, attention=attention, **FP32)
    model = with_factors(skeleton.model, directory, dropout, targets)
    with streamed_lora(skeleton, model, SILENT, **how) as passes:
        # Several chunks of the head in each micro-batch.
        passes.parts.chunk = 7
        torch.manual_seed(11)
        yield passes


def assert_equal(passes, batches, expected, **how):
    losses, factors, state = expected
    mine = passes.accumulate(batches, num_items(batches), **how)
    assert torch.equal(torch.stack(mine), torch.stack(losses[-len(mine) :]))
    for name, gradient in gradients(passes.model).items():
        assert torch.equal(gradient, factors[name]), name
    assert torch.equal(torch.get_rng_state(), state)


@mostly_slow()
def test_every_familys_loss_and_gradients_to_the_bit(variant, tmp_path):
    directory = variant.save(tmp_path)
    batches = micro_batches()
    expected = resident(directory, batches, dropout=0.1)
    with streamed(directory, dropout=0.1) as passes:
        assert_equal(passes, batches, expected)


@pytest.mark.parametrize("dropout", [slow(0.0), 0.1])
@pytest.mark.parametrize("nf4", [False, slow(True)], ids=["fp32", "nf4"])
def test_several_steps_whatever_stays_or_lies_in_memory(base, dropout, nf4):
    if nf4:
        pytest.importorskip("bitsandbytes")
    batches = micro_batches()
    first, second = (
        resident(base, batches, dropout=dropout, nf4=nf4, steps=steps) for steps in (1, 2)
    )
    for stay in (0, 1, 3, 4):
        for host_bytes in (0, 20_000, 10**9):
            with streamed(
                base, dropout=dropout, nf4=nf4, stay=stay, host_bytes=host_bytes
            ) as passes:
                assert_equal(passes, batches, first)
                # Gradients add up on what is there; the random numbers go on.
                assert_equal(passes, batches, second)


def test_hidden_states_may_lie_in_a_file(base, tmp_path):
    batches = micro_batches()
    expected = resident(base, batches, dropout=0.1)
    with streamed(base, dropout=0.1, activations=tmp_path / "states") as passes:
        assert_equal(passes, batches, expected)
        assert not list((tmp_path / "states").iterdir())


def test_mixed_precision(base):
    batches = micro_batches()

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    expected = resident(base, batches, dropout=0.1, autocast=autocast)
    with streamed(base, dropout=0.1) as passes:
        assert_equal(passes, batches, expected, autocast=autocast)


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj",), ("down_proj", "lm_head")])
def test_only_what_is_trained_is_gone_back_to(base, targets):
    batches = micro_batches()
    with streamed(base, targets=targets) as passes:
        passes.accumulate(batches, num_items(batches))
        found = gradients(passes.model)
        assert passes.boundaries == (1 if targets == ("lm_head",) else 4)
    model = with_factors(load_causal_lm(base, **FP32), base, 0.0, targets)
    with chunked_loss(model, 7):
        for batch in batches:
            model(**batch, num_items_in_batch=num_items(batches)).loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, found[name]), name


def test_losses_without_gradients(base):
    batches = [batch for batch in micro_batches(4) if (batch["labels"] != -100).any()]
    model = with_factors(load_causal_lm(base, **FP32), base, 0.1).eval()
    with chunked_loss(model, 7), torch.no_grad():
        expected = [float(model(**batch).loss) for batch in batches]
    with streamed(base, dropout=0.1) as passes:
        assert passes.losses(batches) == expected
        assert passes.model.training
        assert all(p.grad is None for p in passes.model.parameters())


@pytest.mark.parametrize("pins", [True, slow(False)], ids=["pinned", "pageable"])
@pytest.mark.parametrize("nf4", [False, slow(True)], ids=["fp32", "nf4"])
def test_copies_beside_the_computation_keep_their_order(base, nf4, pins):
    if nf4:
        pytest.importorskip("bitsandbytes")
    batches = micro_batches()
    first, second = (resident(base, batches, dropout=0.1, nf4=nf4, steps=steps) for steps in (1, 2))
    for stay in (0, 1, 3, 4):
        for host_bytes in (0, 20_000, 10**9):
            copies = FakeCopies(pins)
            with streamed(
                base, dropout=0.1, nf4=nf4, stay=stay, host_bytes=host_bytes, copies=copies
            ) as passes:
                passes.accumulate(batches[:1], 100)
                passes.model.zero_grad()
                watched_by(copies, passes, stay)
                torch.manual_seed(11)
                assert_equal(passes, batches, first)
                assert_equal(passes, batches, second)
            assert copies.broken == [] and copies.pinned == set()


def watched_by(copies, passes, stay):
    """Every layer that comes tells which weights it reads."""

    def tell(slots, *_):
        for slot in slots:
            for module, kind in slot.places:
                copies.reading(module._parameters[kind])

    for layer, slots in list(zip(passes.parts.layers, passes.slots, strict=True))[stay:]:
        # Not of the layer itself: before the first one and after the last, all are passed through.
        layer.mlp.register_forward_pre_hook(partial(tell, slots))


class Counted:
    """Loads of each layer, and weights of them that are alive."""

    def __init__(self, passes):
        self.loads, self._there = [], []
        load = passes.source.load

        def counted(index, *how):
            weights = load(index, *how)
            self.loads.append(index)
            self._there += [(index, weakref.ref(weight.data)) for weight in weights]
            return weights

        passes.source.load = counted

    def layers_alive(self):
        return {index for index, tensor in self._there if tensor() is not None}


def test_a_layer_is_read_twice_a_step_however_many_micro_batches(base):
    for count in (1, 3, 6):
        with streamed(base) as passes:
            counted = Counted(passes)
            for _ in range(3):
                passes.accumulate(micro_batches(count), 100)
        # Both ends turn round with what is held: two of four layers, twice a step.
        assert counted.loads[:6] == [0, 1, 2, 3, 1, 0]
        assert counted.loads[6:] == [2, 3, 1, 0] * 2


def test_no_more_than_two_layers_are_there_at_a_time(base):
    with streamed(base) as passes:
        passes.accumulate(micro_batches(1), 100)
        counted, most = Counted(passes), []
        for layer in passes.parts.layers:
            layer.mlp.register_forward_hook(lambda *_: most.append(counted.layers_alive()))
        passes.accumulate(micro_batches(), 100)
        assert len(most) == 3 * 7 and max(map(len, most)) == 2


def test_what_fails_leaves_no_weights_and_can_be_done_again(base):
    batches = micro_batches()
    expected = resident(base, batches, dropout=0.1)
    with streamed(base, dropout=0.1) as passes:
        counted = Counted(passes)
        for failing in (0, 2, 3):

            def fail(*_):
                raise RuntimeError("out of memory")

            handle = passes.parts.layers[failing].mlp.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                passes.accumulate(batches, num_items(batches))
            handle.remove()
            gc.collect()
            slots = [slot for slots in passes.slots for slot in slots]
            places = [(slot, *place) for slot in slots for place in slot.places]
            assert all(module._parameters[kind] is slot.stand_in for slot, module, kind in places)
            assert len(counted.layers_alive()) <= 2
        passes.model.zero_grad()
        torch.manual_seed(11)
        assert_equal(passes, batches, expected)
    del passes
    gc.collect()
    assert not counted.layers_alive()


def with_config(variant, folder, changes):
    directory = variant.save(folder)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("phi", {"attention_dropout": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}),
        slow("seed_oss", {"attention_dropout": 0.1, "residual_dropout": 0.1}),
        slow("gpt_neox", {"attention_dropout": 0.1, "hidden_dropout": 0.1}),
        slow(
            "starcoder2",
            {"attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1},
        ),
    ],
)
def test_every_dropout_of_a_config_is_the_resident_models(family, rates, attention, tmp_path):
    variant = next(v for v in VARIANTS if v.model_type == family)
    directory = with_config(variant, tmp_path, rates)
    batches = micro_batches()
    expected = resident(directory, batches, dropout=0.1, attention=attention)
    without = resident(variant.save(tmp_path / "without"), batches, dropout=0.1)
    # The rates are in use, and not only read.
    assert not torch.equal(expected[0][0], without[0][0])
    with streamed(directory, dropout=0.1, attention=attention) as passes:
        assert_equal(passes, batches, expected)


@pytest.mark.slow
def test_routers_that_blur_what_they_see_draw_as_in_a_resident_pass(tmp_path):
    mixtral = next(variant for variant in VARIANTS if variant.name == "mixtral")
    blurred = replace(mixtral, changes={**mixtral.changes, "router_jitter_noise": 0.1})
    directory = blurred.save(tmp_path / "blurred")
    batches = micro_batches()
    expected = resident(directory, batches, dropout=0.1)
    without = resident(mixtral.save(tmp_path / "plain"), batches, dropout=0.1)
    assert not torch.equal(expected[0][0], without[0][0])
    with streamed(directory, dropout=0.1) as passes:
        assert_equal(passes, batches, expected)


def test_draws_of_another_kind_are_refused(base):
    with streamed(base, dropout=0.1) as passes:
        passes.parts.layers[1].mlp.register_forward_pre_hook(
            lambda _, given: (given[0] * (1 + 0.01 * torch.randn_like(given[0])),)
        )
        with pytest.raises(LoramError, match="draws random numbers"):
            passes.accumulate(micro_batches(), 100)
