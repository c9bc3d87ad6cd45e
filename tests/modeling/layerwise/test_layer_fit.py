"""Layer by layer reconstruction, against numpy on the whole models' activations."""

import importlib

import numpy as np
import pytest
import torch
from helpers.family_models import LENGTH, SAMPLES, make_model, mostly_slow_families, windows
from helpers.tiny_models import save_tokenizer

from loram_cli.modeling.layerwise.layer_fit import Reconstruction, reconstruct_layers
from loram_cli.modeling.layerwise.loss import streamed_loss
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.load import load_causal_lm
from loram_cli.reporting import NullReporter
from loram_cli.stages.prune import stage as prune

pytestmark = pytest.mark.integration

SILENT = NullReporter()


def pruned(base, out, **changes):
    settings = {"ratio": 0.5, "keep_first": 1, "keep_last": 1, "strategy": "rand"}
    prune.run(prune.PruneSpec(model=base, out=out, **{**settings, **changes}), SILENT)
    return out


def reconstructed(base, small_dir, tmp_path, **changes):
    how = Reconstruction(**{"stored": torch.float32, "ridge": 0.05, **changes})
    shape = (SAMPLES, LENGTH, 32)
    with (
        LayerStream(base, "cpu") as full,
        LayerStream(small_dir, "cpu") as small,
        BoundaryPool(shape, full.dtype, 10**9, tmp_path / "a") as a,
        BoundaryPool(shape, full.dtype, 0, tmp_path / "b") as b,
    ):
        return dict(
            reconstruct_layers(full, small, windows(), (1, 2), lambda i: None, (a, b), SILENT, how)
        )


@mostly_slow_families()
def test_every_family_comes_nearer_to_its_full_layers(family, tmp_path):
    base = make_model(family, tmp_path / "base")
    save_tokenizer(base)
    fits = reconstructed(base, pruned(base, tmp_path / "pruned"), tmp_path)
    assert list(fits) == [1, 2]
    for fit in fits.values():
        assert 0 < fit.error_after < fit.error_before
        assert len(fit.weights) == sum(bool(module.columns) for module in family.modules)
    assert not (tmp_path / "b").exists()


def test_equals_least_squares_on_the_whole_models(base, tmp_path):
    small_dir = pruned(base, tmp_path / "pruned")
    found = reconstructed(base, small_dir, tmp_path, ridge=0.0)[1].weights
    full, small = load_causal_lm(base), load_causal_lm(small_dir)
    seen = {}

    def watch(model, key):
        layer = model.model.layers[1]
        modules = {"attention": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.update({(key, name): (args[0], out)})
            )
        layer.register_forward_hook(
            lambda _, args, out: seen.update({(key, "layer"): (args[0], out)})
        )
        with torch.no_grad():
            model(windows())

    def flat(tensor):
        return tensor.reshape(-1, tensor.shape[-1]).double().numpy()

    watch(full, "full")
    watch(small, "small")
    after_attention = flat(seen["full", "layer"][1]) - flat(seen["full", "mlp"][1])
    wanted = after_attention - flat(seen["small", "layer"][0])
    inputs = flat(seen["small", "attention"][0])
    expected = np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    weight = found["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-3, atol=1e-4)
    # The MLP's output is fitted on what comes after the refitted attention.
    small.model.layers[1].self_attn.o_proj.weight.data.copy_(weight)
    watch(small, "small")
    wanted = flat(seen["full", "layer"][1]) - (
        flat(seen["small", "layer"][1]) - flat(seen["small", "mlp"][1])
    )
    expected = np.linalg.lstsq(flat(seen["small", "mlp"][0]), wanted, rcond=None)[0].T
    weight = found["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_an_unpruned_layer_is_left_as_it_is(base, tmp_path):
    """Were the two trajectories mixed up, a model would not be its own best fit."""
    fits = reconstructed(base, base, tmp_path, ridge=0.0)
    module = importlib.import_module("safetensors.torch")
    stored = module.load_file(base / "model.safetensors")
    for fit in fits.values():
        assert fit.error_before == pytest.approx(0, abs=1e-9)
        for name, weight in fit.weights.items():
            torch.testing.assert_close(weight, stored[name], rtol=1e-4, atol=1e-5)


def test_streamed_loss_is_the_whole_models_loss(base, tmp_path):
    small_dir = pruned(base, tmp_path / "pruned")
    model = load_causal_lm(small_dir)
    with torch.no_grad():
        expected = float(model(input_ids=windows(), labels=windows()).loss)
    with (
        LayerStream(small_dir, "cpu") as stream,
        BoundaryPool((SAMPLES, LENGTH, 32), stream.dtype, 10**9, tmp_path / "a") as pool,
    ):
        assert streamed_loss(stream, windows(), pool, SILENT) == pytest.approx(expected, rel=1e-5)
