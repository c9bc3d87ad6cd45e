"""Models of which some layers have weights only while they run, beside the same ones whole."""

import gc
import os
import shutil
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers.fake_copies import FakeCopies, watched_by
from helpers.nf4 import nf4_model
from helpers.slow import slow
from helpers.variants import mostly_slow

from loram_cli.errors import LoramError
from loram_cli.modeling.load import load_causal_lm
from loram_cli.modeling.offload import loaded_within, resident_layers, weight_bytes
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import NullReporter
from loram_cli.training.adapters import load_adapter

pytestmark = pytest.mark.integration

HOW = {"dtype": torch.float32, "device": "cpu"}
SILENT = NullReporter()
IDS = torch.arange(3, 43).view(2, 20)


def skeleton_of(directory: Path, **how) -> SkeletonModel:
    return SkeletonModel(directory, **{**HOW, **how})


def logits_of(model, ids=IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def whole_logits(directory: Path, adapter: Path | None, nf4: bool) -> torch.Tensor:
    def with_adapter(model):
        return load_adapter(model, adapter) if adapter else model

    if nf4:
        return logits_of(nf4_model(directory, with_adapter))
    return logits_of(with_adapter(load_causal_lm(directory, **HOW)))


def held_bytes(model) -> int:
    """All weights that are no stand-ins, which are one number over and over."""
    return sum(p.nbytes for p in model.parameters() if any(p.stride()))


def open_files() -> set[str]:
    return {file.name for file in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("nf4", [False, slow(True)], ids=["fp32", "nf4"])
@pytest.mark.parametrize("part", ["base", slow("pruned"), "recovered"])
def test_the_same_to_the_bit_however_many_layers_stay(base, finished_run, part, nf4):
    directory = finished_run / "pruned" if part == "pruned" else base
    adapter = {"pruned": "adapter", "recovered": "recovered"}.get(part)
    adapter = finished_run / adapter if adapter else None
    expected = whole_logits(directory, adapter, nf4)
    for stay in (0, 1, 3, 4):
        # Nothing, some, and all of the others in the machine's memory.
        for host_bytes in (0, 20_000, 10**9):
            skeleton = skeleton_of(directory, nf4=nf4)
            model = load_adapter(skeleton.model, adapter) if adapter else skeleton.model
            with loaded_within(skeleton, stay, SILENT, host_bytes=host_bytes):
                for _ in range(2):
                    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("pins", [True, slow(False)], ids=["pinned", "pageable"])
@pytest.mark.parametrize("nf4", [False, slow(True)], ids=["fp32", "nf4"])
def test_copies_beside_the_computation_keep_their_order(base, finished_run, nf4, pins):
    adapter = finished_run / "recovered"
    expected = whole_logits(base, adapter, nf4)
    for stay in (0, 1, 3, 4):
        for host_bytes in (0, 20_000, 10**9):
            skeleton = skeleton_of(base, nf4=nf4)
            model = load_adapter(skeleton.model, adapter)
            copies = FakeCopies(pins)
            with loaded_within(skeleton, stay, SILENT, host_bytes=host_bytes, copies=copies):
                watched_by(copies, skeleton, stay)
                for _ in range(3):
                    assert torch.equal(logits_of(model), expected)
                if host_bytes != 20_000:
                    assert len(copies.pinned) == (4 - stay) * (pins and host_bytes > 0)
            assert copies.broken == [] and copies.pinned == set()
            # Each layer at each pass, and perhaps the one ahead of a fourth; a single one stays.
            passing = 4 - stay
            copied = 3 * passing if passing > 1 else passing
            assert copied <= copies.blocks <= copied + (passing > 1)


def test_copies_out_of_order_are_noticed(base, monkeypatch):
    """What the books of the stand-in are worth: without its events, the rules break."""
    for rule, method in (("overwritten", "computed"), ("read before", "wait")):
        skeleton = skeleton_of(base)
        copies = FakeCopies()
        monkeypatch.setattr(copies, method, lambda *_: None)
        with loaded_within(skeleton, 0, SILENT, host_bytes=10**9, copies=copies):
            watched_by(copies, skeleton, 0)
            logits_of(skeleton.model)
        assert any(found.startswith(rule) for found in copies.broken)


def test_a_pass_that_fails_leaves_the_order_of_copies_whole(base):
    skeleton = skeleton_of(base)
    copies = FakeCopies()
    layers = [layer for layer, _ in skeleton.layers()]
    expected = whole_logits(base, None, nf4=False)
    with loaded_within(skeleton, 0, SILENT, host_bytes=10**9, copies=copies):
        watched_by(copies, skeleton, 0)
        for failing in (2, 1, 0, 3):
            handle = layers[failing].mlp.register_forward_hook(raising("out of memory"))
            with pytest.raises(RuntimeError, match="out of memory"):
                logits_of(skeleton.model)
            handle.remove()
            assert torch.equal(logits_of(skeleton.model), expected)
    assert copies.broken == []


@mostly_slow()
def test_every_family_runs_layer_by_layer(variant, tmp_path):
    directory = variant.save(tmp_path)
    skeleton = skeleton_of(directory)
    with loaded_within(skeleton, 1, SILENT):
        assert torch.equal(logits_of(skeleton.model), whole_logits(directory, None, nf4=False))


def test_no_more_is_held_than_the_budget(base):
    total = weight_bytes(skeleton_of(base))
    seen = set()
    for budget in range(0, total + 1000, 1000):
        skeleton = skeleton_of(base)
        try:
            stay = resident_layers(skeleton, budget)
        except LoramError as error:
            assert "embedding, head and two decoder layers take" in str(error)
            assert not seen
            continue
        assert stay >= max(seen, default=0)
        if stay in seen:
            continue
        seen.add(stay)
        highest = []
        with loaded_within(skeleton, stay, SILENT):
            for layer, _ in skeleton.layers():
                layer.register_forward_pre_hook(
                    lambda *_, held=highest, model=skeleton.model: held.append(held_bytes(model))
                )
            logits_of(skeleton.model)
            logits_of(skeleton.model)
        # Another layer is on its way meanwhile.
        layer_bytes = max(sum(s.num_bytes for s in slots) for _, slots in skeleton.layers())
        assert max(highest) + layer_bytes * (stay < 4) <= budget
    assert seen == {0, 1, 4}


def test_weights_go_after_a_pass_and_after_a_failure(base):
    skeleton = skeleton_of(base)
    with loaded_within(skeleton, 0, SILENT):
        empty = held_bytes(skeleton.model)
        logits_of(skeleton.model)
        assert held_bytes(skeleton.model) == empty
        broken = next(layer for layer, _ in list(skeleton.layers())[2:])
        handle = broken.mlp.register_forward_hook(raising("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            logits_of(skeleton.model)
        assert held_bytes(skeleton.model) == empty
        handle.remove()
        assert torch.equal(logits_of(skeleton.model), whole_logits(base, None, nf4=False))


def raising(text: str):
    def fail(*_):
        raise RuntimeError(text)

    return fail


class Weights:
    """The weights that are read, and those of them that are still there."""

    def __init__(self, skeleton, monkeypatch):
        self._there = []
        self.failing = set()
        read = skeleton.read

        def watched(slot, reader):
            if any(slot.tensor.startswith(prefix) for prefix in self.failing):
                raise RuntimeError("CUDA out of memory, ahead of time")
            weight = read(slot, reader)
            self._there.append(weakref.ref(weight.data))
            return weight

        monkeypatch.setattr(skeleton, "read", watched)

    def there(self) -> int:
        gc.collect()
        return sum(tensor() is not None for tensor in self._there)


@pytest.mark.slow
def test_passes_that_fail_leave_no_more_than_two_layers(base, monkeypatch):
    """The one that failed and the one on its way: the feed keeps both, as the budget allows."""
    skeleton = skeleton_of(base)
    weights = Weights(skeleton, monkeypatch)
    layers = [layer for layer, _ in skeleton.layers()]
    per_layer = len(list(layers[0].parameters()))
    with loaded_within(skeleton, 0, SILENT):
        others = weights.there()
        logits_of(skeleton.model)
        for failing in (2, 1, 0, 1, 2):
            handle = layers[failing].mlp.register_forward_hook(raising("out of memory"))
            with pytest.raises(RuntimeError, match="out of memory"):
                logits_of(skeleton.model)
            handle.remove()
            deadline = time.monotonic() + 10
            while weights.there() - others > 2 * per_layer and time.monotonic() < deadline:
                time.sleep(0.01)
            assert weights.there() - others <= 2 * per_layer
        assert torch.equal(logits_of(skeleton.model), whole_logits(base, None, nf4=False))
    assert weights.there() == others


def test_what_failed_ahead_of_a_pass_that_failed_is_tried_again(base, monkeypatch):
    skeleton = skeleton_of(base)
    weights = Weights(skeleton, monkeypatch)
    layers = [layer for layer, _ in skeleton.layers()]
    with loaded_within(skeleton, 0, SILENT):
        handle = layers[1].mlp.register_forward_hook(raising("out of memory"))
        weights.failing = {"model.layers.2."}
        with pytest.raises(RuntimeError, match="out of memory"):
            logits_of(skeleton.model)
        handle.remove()
        weights.failing = set()
        assert torch.equal(logits_of(skeleton.model), whole_logits(base, None, nf4=False))
        # What fails again when its turn has come is told.
        weights.failing = {"model.layers.2."}
        with pytest.raises(RuntimeError, match="ahead of time"):
            logits_of(skeleton.model)


def test_a_model_that_is_given_up_gives_up_its_files_and_itself(base):
    gc.collect()
    before = open_files()
    skeleton = skeleton_of(base)
    gc.disable()
    try:
        with loaded_within(skeleton, 1, SILENT):
            logits_of(skeleton.model)
            assert open_files() - before
        assert not open_files() - before
        gone = weakref.ref(skeleton.model)
        del skeleton
        assert gone() is None
    finally:
        gc.enable()


def test_a_shard_that_ends_early_is_told_when_its_layer_comes(tmp_path, base):
    directory = Path(shutil.copytree(base, tmp_path / "cut"))
    skeleton = skeleton_of(directory)
    with loaded_within(skeleton, 0, SILENT):
        shard = directory / "model.safetensors"
        os.truncate(shard, shard.stat().st_size // 2)
        with pytest.raises(LoramError, match=r"model\.safetensors"):
            logits_of(skeleton.model)
