"""Layers with experts that come as they run, of which few tokens reach few."""

import pytest
import torch
from helpers.fake_copies import FakeCopies
from helpers.slow import slow
from helpers.variants import VARIANTS

from loram_cli.arch.registry import family_for
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.offload import loaded_within
from loram_cli.modeling.skeleton import SkeletonModel, Weight
from loram_cli.reporting import NullReporter

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
        assert torch.equal(continued(skeleton.model), continued(load_causal_lm(directory, **HOW)))
    for slot, wanted in reads.wanted:
        assert 0 < len(wanted) <= len(IDS) * skeleton.top_k < slot.experts
    return reads


@pytest.mark.parametrize(
    "variant", [v if v is MIXTRAL else slow(v, name=v.name) for v in MIXTURES], ids=lambda v: v.name
)
def test_only_the_experts_that_tokens_reach_are_read(variant, tmp_path, monkeypatch):
    directory = variant.save(tmp_path)
    assert check(directory, monkeypatch).wanted
    copies = FakeCopies()
    assert check(directory, monkeypatch, copies=copies).wanted
    assert copies.broken == []
