"""Gradients by what linears give out, with one layer in memory, against the whole model's."""

from pathlib import Path

import pytest
import torch
from helpers.family_models import LENGTH, SAMPLES, windows
from helpers.tiny_models import make_base
from helpers.variants import VARIANTS, mostly_slow

from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise import output_gradients, walk
from loram_cli.modeling.layerwise.output_gradients import OutputGradients
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.load import load_causal_lm
from loram_cli.reporting import NullReporter


def whole_models(model: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """By weight: the loss's gradient by the module's output, shape (tokens, rows)."""
    loaded, found = load_causal_lm(model, dtype=torch.float32, device="cpu"), {}
    for name in names:
        module = loaded.get_submodule(name.removesuffix(".weight"))

        def keep(module, args, output, name=name):
            output.register_hook(lambda g: found.__setitem__(name, g.flatten(0, -2)))

        module.register_forward_hook(keep)
    ids = windows().long()
    logits = loaded(ids).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return found


def collected(model: Model, work: Path, modules: list[str]) -> dict[str, torch.Tensor]:
    """What is kept, by weight."""
    with LayerStream(model, "cpu") as stream, OutputGradients(work / "gradients") as gradients:
        shape = (SAMPLES, LENGTH, stream.hidden_size)
        with BoundaryPool(shape, stream.dtype, 10**9, work / "activations") as pool:
            gradients.collect(stream, windows(), modules, pool, NullReporter())
        names = [
            n for n in model.linear_names if n.removesuffix(".weight").endswith(tuple(modules))
        ]
        found = {name: gradients.take(name) for name in names}
    assert list(work.iterdir()) == []
    return found


@mostly_slow(VARIANTS)
def test_they_vary_as_the_whole_models_in_every_family(variant, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(walk, "BATCH_TOKENS", 2 * LENGTH)
    model = Model.open(variant.save(tmp_path / "base"))
    whole = whole_models(model.directory, model.linear_names)
    found = collected(model, tmp_path / "work", [m.name for m in model.family.modules])
    assert list(found) == list(model.linear_names)
    for name, kept in found.items():
        rows = model.shapes[name][0]
        assert kept.shape == (rows, rows)
        expected = whole[name].T @ whole[name]
        # Kept in bf16.
        assert (kept.T @ kept - expected).abs().max() <= 0.02 * expected.abs().max() > 0, name


def test_of_many_outputs_random_signs_mix_all_tokens(tmp_path: Path, monkeypatch):
    model = Model.open(make_base(tmp_path / "base"))
    whole = whole_models(model.directory, model.linear_names)
    monkeypatch.setattr(output_gradients, "MOST_KEPT", 36)
    found = collected(model, tmp_path / "work", ["mlp.up_proj"])
    for name, kept in found.items():
        assert kept.shape == (36, model.shapes[name][0]) and kept.shape[1] > 36
        share = kept.square().sum() / whole[name].square().sum()
        assert 0.6 < share < 1.6
        expected, mixed = whole[name].T @ whole[name], kept.T @ kept
        similar = (expected * mixed).sum() / expected.norm() / mixed.norm()
        assert similar > 0.65


def test_a_linear_that_the_loss_does_not_reach_is_told(tmp_path: Path, monkeypatch):
    model = Model.open(make_base(tmp_path / "base"))
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda self, hook: None)
    with LayerStream(model, "cpu") as stream, OutputGradients(tmp_path / "kept") as gradients:
        shape = (SAMPLES, LENGTH, stream.hidden_size)
        with (
            BoundaryPool(shape, stream.dtype, 10**9, tmp_path / "activations") as pool,
            pytest.raises(LoramError, match="up_proj: the loss's gradient does not reach it"),
        ):
            gradients.collect(stream, windows(), ["mlp.up_proj"], pool, NullReporter())
    assert not (tmp_path / "kept").exists()
