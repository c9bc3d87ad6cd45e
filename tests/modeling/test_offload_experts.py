"""Layers with experts that come as they run, of which few tokens reach few."""

import pytest
import torch
from helpers.fake_copies import FakeCopies, watched_by
from helpers.mxfp4_files import save_twins
from helpers.slow import slow
from helpers.variants import VARIANTS

from loram_cli.arch.registry import family_for
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.offload import loaded_within, reaches_most
from loram_cli.modeling.skeleton import SkeletonModel, Weight
from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import attach_lora, load_adapter, lora_config

pytestmark = pytest.mark.integration

HOW = {"dtype": torch.float32, "device": "cpu"}
SILENT = NullReporter()
# Two texts: a token of each reaches four experts of six at most.
IDS = torch.arange(3, 43).view(2, 20)
MIXTURES = [v for v in VARIANTS if family_for({"model_type": v.model_type}, "").experts]
MIXTRAL = next(v for v in MIXTURES if v.name == "mixtral")


def continued(model, ids=IDS) -> torch.Tensor:
    """Logits after a prompt, and after four tokens of which each is the likeliest one."""
    found, cache, given = [], None, ids
    with torch.inference_mode():
        for _ in range(5):
            out = model.eval()(input_ids=given, past_key_values=cache, use_cache=True)
            cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(out.logits[:, -1])
    return torch.stack(found)


class ExpertReads:
    """Which experts of which tensor are read by themselves; all others are no numbers."""

    def __init__(self, skeleton, monkeypatch):
        self.wanted = []
        unread, read_experts = skeleton.unread, skeleton.read_experts

        def nothing(slot, device=None):
            weight = unread(slot, device)
            return weight if weight.data.is_meta else Weight(weight.data.fill_(torch.nan))

        def watched(slot, reader, wanted, into):
            self.wanted.append((slot, list(wanted)))
            read_experts(slot, reader, wanted, into)

        monkeypatch.setattr(skeleton, "unread", nothing)
        monkeypatch.setattr(skeleton, "read_experts", watched)


def check(directory, monkeypatch, *, stay=0, host_bytes=0, copies=None) -> ExpertReads:
    """Logits are those of the model that is whole in memory, to the bit."""
    skeleton = SkeletonModel(directory, **HOW)
    reads = ExpertReads(skeleton, monkeypatch)
    with loaded_within(skeleton, stay, SILENT, host_bytes=host_bytes, copies=copies):
        if copies is not None:
            watched_by(copies, skeleton, stay)
        assert torch.equal(continued(skeleton.model), continued(load_causal_lm(directory, **HOW)))
    assert copies is None or copies.broken == []
    for slot, wanted in reads.wanted:
        assert 0 < len(wanted) <= len(IDS) * skeleton.top_k < slot.experts
    return reads


@pytest.mark.parametrize(
    "variant", [v if v is MIXTRAL else slow(v, name=v.name) for v in MIXTURES], ids=lambda v: v.name
)
def test_only_the_experts_that_tokens_reach_are_read(variant, tmp_path, monkeypatch):
    directory = variant.save(tmp_path)
    assert check(directory, monkeypatch).wanted
    assert check(directory, monkeypatch, copies=FakeCopies()).wanted


def test_experts_come_from_the_machines_memory_where_their_layer_is(tmp_path, monkeypatch):
    directory = MIXTRAL.save(tmp_path)
    for copies in (None, FakeCopies()):
        reads = check(directory, monkeypatch, stay=1, host_bytes=10**9, copies=copies)
        # The prompt has brought whole layers there.
        assert reads.wanted == []


def test_what_stands_beside_experts_is_kept_in_the_machines_memory(tmp_path, monkeypatch):
    skeleton = SkeletonModel(MIXTRAL.save(tmp_path), **HOW)
    expected = continued(load_causal_lm(tmp_path, **HOW), IDS[:, :1])
    reads, read, seen = ExpertReads(skeleton, monkeypatch), skeleton.read, []
    monkeypatch.setattr(
        skeleton, "read", lambda slot, reader: seen.append(slot) or read(slot, reader)
    )
    copies = FakeCopies()
    with loaded_within(skeleton, 0, SILENT, host_bytes=10**9, copies=copies):
        assert torch.equal(continued(skeleton.model, IDS[:, :1]), expected)
    assert len(seen) == len(skeleton.slots) - len({slot.tensor for slot, _ in reads.wanted})
    # Each expert once.
    brought = [(slot.tensor, expert) for slot, wanted in reads.wanted for expert in wanted]
    assert len(brought) == len(set(brought))
    assert copies.broken == [] and copies.pinned == set()


def test_bytes_are_counted_as_they_are_brought(tmp_path):
    skeleton = SkeletonModel(MIXTRAL.save(tmp_path), **HOW)
    slots = [slot for _, slots in skeleton.layers() for slot in slots]
    beside = sum(slot.num_bytes for slot in slots if not slot.experts)
    one = sum(slot.num_bytes // slot.experts for slot in slots if slot.experts)
    with loaded_within(skeleton, 0, SILENT) as source, torch.inference_mode():
        skeleton.model(input_ids=IDS[:1, :1])
        skeleton.model(input_ids=IDS[:1, :1])
    # At the end the first layer and the one after it are there once more, without experts.
    ahead = beside // len(list(skeleton.layers()))
    assert source.loaded_bytes - 2 * (beside + 2 * one) in (0, ahead)


def test_experts_with_factors_are_read_when_tokens_reach_them(tmp_path, monkeypatch):
    directory = MIXTRAL.save(tmp_path / "base")
    model = load_causal_lm(directory, **HOW)
    config = lora_config(("q_proj", "experts"), dropout=0, experts=model.family.experts)
    trained = attach_lora(model, config, seed=0)
    for name, factor in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(factor, generator=torch.Generator().manual_seed(1))
    trained.save_pretrained(tmp_path / "adapter")
    expected = continued(load_adapter(load_causal_lm(directory, **HOW), tmp_path / "adapter"))
    assert not torch.equal(expected, continued(load_causal_lm(directory, **HOW)))
    skeleton = SkeletonModel(directory, **HOW)
    reads = ExpertReads(skeleton, monkeypatch)
    adapted = load_adapter(skeleton.model, tmp_path / "adapter")
    with loaded_within(skeleton, 0, SILENT):
        assert torch.equal(continued(adapted), expected)
    assert reads.wanted


def test_experts_in_mxfp4_are_read_one_by_one(tmp_path, monkeypatch):
    packed, plain = save_twins(tmp_path)
    assert check(packed, monkeypatch).wanted
    skeleton = SkeletonModel(packed, **HOW)
    with loaded_within(skeleton, 0, SILENT):
        assert torch.equal(continued(skeleton.model), continued(load_causal_lm(plain, **HOW)))


def test_a_pass_that_fails_among_experts_leaves_the_next_one_right(tmp_path):
    directory = MIXTRAL.save(tmp_path)
    skeleton = SkeletonModel(directory, **HOW)
    broken = list(skeleton.layers())[2][0].mlp.experts

    def fail(*_):
        raise RuntimeError("out of memory")

    with loaded_within(skeleton, 0, SILENT), torch.inference_mode():
        handle = broken.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            skeleton.model(input_ids=IDS[:1, :1])
        handle.remove()
        assert torch.equal(continued(skeleton.model), continued(load_causal_lm(directory, **HOW)))


def test_a_layer_is_read_whole_where_tokens_reach_nearly_all_of_it(base, tmp_path):
    mixture = SkeletonModel(MIXTRAL.save(tmp_path), **HOW)
    # Two of six: a token leaves two thirds out, and five tokens (2/3)^5 = 0.13 of them.
    assert [reaches_most(mixture, tokens) for tokens in (1, 5, 6, 2048)] == [
        False,
        False,
        True,
        True,
    ]
    assert reaches_most(SkeletonModel(base, **HOW), 1)
