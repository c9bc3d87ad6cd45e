"""Gradients with one layer in memory, against a backward pass through the whole model."""

from pathlib import Path

import pytest
import torch
from helpers.family_models import LENGTH, SAMPLES, make_model, mostly_slow_families, windows
from helpers.reporters import ProgressRecorder
from helpers.tiny_models import make_base
from helpers.whole_model_gradients import whole_model_gradients
from safetensors.torch import load_file, save_file

from loram_cli.arch.registry import families
from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise import states, walk
from loram_cli.modeling.layerwise.gradients import layer_gradients
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.reporting import NullReporter

LAYERS = range(1, 3)


def streamed(model: Path, tmp_path: Path, memory_bytes: int = 10**9, layers: range = LAYERS):
    found, order = {}, []
    with LayerStream(model, "cpu") as stream:
        modules = [module.name for module in stream.family.modules]
        shape = (SAMPLES, LENGTH, stream.hidden_size)
        with BoundaryPool(shape, stream.dtype, memory_bytes, tmp_path / "activations") as pool:
            for i, layer in layer_gradients(
                stream, windows(), layers, modules, pool, NullReporter()
            ):
                order.append(i)
                for name, pair in layer.items():
                    found[f"{stream.family.layer_prefix(i)}{name}.weight"] = pair
            assert pool.disk_bytes == 0 or memory_bytes < 10**9
    assert order == list(reversed(layers))
    assert not (tmp_path / "activations").exists()
    return found


def check_equal(model: Path, found, tolerance: float) -> None:
    reference = whole_model_gradients(model, windows(), found)
    for name, (weight, gradient) in found.items():
        assert torch.equal(weight, reference[name][0])
        expected = reference[name][1].float()
        assert expected.abs().max() > 0
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max(), name


def test_progress_goes_on_within_the_head(tmp_path, monkeypatch):
    """A wide vocabulary's head takes as long as many layers."""
    monkeypatch.setattr(walk, "BATCH_TOKENS", 2 * LENGTH)
    model = make_base(tmp_path / "base")
    recorder = ProgressRecorder()
    with LayerStream(model, "cpu") as stream:
        shape = (SAMPLES, LENGTH, stream.hidden_size)
        with BoundaryPool(shape, stream.dtype, 10**9, tmp_path / "activations") as pool:
            layers = range(stream.num_layers)
            list(layer_gradients(stream, windows(), layers, ["mlp.up_proj"], pool, recorder))
        batches = -(-SAMPLES // 2)
        assert batches > 1
        steps = batches * (2 * stream.num_layers + 1)
    assert recorder.steps == [pytest.approx(1 / batches)] * steps
    assert sum(recorder.steps) == pytest.approx(recorder.total)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@mostly_slow_families()
def test_equal_to_the_whole_model_in_every_family(family, tied, tmp_path, monkeypatch):
    # Two windows a batch and several chunks of logits, with a rest in both.
    monkeypatch.setattr(walk, "BATCH_TOKENS", 2 * LENGTH)
    monkeypatch.setattr("loram_cli.memory.setup.CHUNK_LOGITS", 7 * 258)
    model = make_model(family, tmp_path / "base", tie_word_embeddings=tied)
    check_equal(model, streamed(model, tmp_path), 1e-5)


def test_equal_with_a_head_of_its_own_beside_a_tied_embedding(tmp_path):
    """As ``from_pretrained`` takes it, and with gradients that are not the embedding's."""
    model = make_base(tmp_path / "base", tie_word_embeddings=True)
    file = model / "model.safetensors"
    weights = load_file(file)
    shared = streamed(model, tmp_path)
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].flip(0).contiguous()},
        file,
    )
    found = streamed(model, tmp_path)
    check_equal(model, found, 1e-5)
    assert all(not torch.equal(found[name][1], shared[name][1]) for name in found)


def test_equal_with_biases_and_a_sliding_window(tmp_path):
    known = {family.family: family for family in families()}
    biased = make_model(known["llama"], tmp_path / "a", attention_bias=True, mlp_bias=True)
    check_equal(biased, streamed(biased, tmp_path), 1e-5)
    sliding = make_model(known["mistral"], tmp_path / "b", sliding_window=8)
    check_equal(sliding, streamed(sliding, tmp_path), 1e-5)


@pytest.mark.parametrize("slow", [False, True])
def test_bf16_differs_by_rounding_alone(tmp_path, monkeypatch, slow):
    """And is left to fp32 on a CPU that takes many times as long in it."""
    monkeypatch.setattr(states, "slow_in_bf16", lambda device: slow)
    computed = torch.float32 if slow else torch.bfloat16
    llama = next(family for family in families() if family.family == "llama")
    model = make_model(llama, tmp_path / "base", torch.bfloat16)
    found = streamed(model, tmp_path)
    assert {(w.dtype, g.dtype) for w, g in found.values()} == {(computed, torch.float32)}
    if not slow:
        check_equal(model, found, 0.03)


def test_activations_on_disk_change_nothing(base, tmp_path):
    in_memory = streamed(base, tmp_path)
    one_boundary = SAMPLES * LENGTH * 32 * 4
    on_disk = streamed(base, tmp_path, memory_bytes=2 * one_boundary)
    assert all(torch.equal(in_memory[name][1], on_disk[name][1]) for name in in_memory)


def test_the_first_and_the_last_layer_can_be_ranked(base, tmp_path):
    check_equal(base, streamed(base, tmp_path, layers=range(4)), 1e-5)


def test_damaged_weights_are_named(tmp_path):

    base = make_base(tmp_path / "base")
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoramError, match=r"layers\.3\.mlp\.up_proj\.weight has NaN"):
        streamed(base, tmp_path)
    assert not (tmp_path / "activations").exists()


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"].mul_(1e38)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoramError, match="loss on the calibration text is not finite"):
        streamed(base, tmp_path)
