"""Experts held in 16 bits and computed in fp32, in every family that has them."""

import json
from pathlib import Path

import pytest
import torch
from helpers.family_models import LENGTH, SAMPLES, windows
from helpers.variants import VARIANTS, Variant, mostly_slow
from safetensors.torch import load_file, save_file

from loram_cli.arch.registry import family_for
from loram_cli.checkpoint.model import Model
from loram_cli.modeling.layerwise.block_steps import BlockSteps, take_block_steps
from loram_cli.modeling.layerwise.loss import streamed_loss
from loram_cli.modeling.layerwise.raised import RaisedWeight
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.load import load_causal_lm
from loram_cli.reporting import NullReporter


def with_experts() -> list[Variant]:
    return [
        variant
        for variant in VARIANTS
        if family_for({"model_type": variant.model_type}, variant.name).experts is not None
    ]


def stored(variant: Variant, directory: Path, dtype: torch.dtype = torch.float16) -> Path:
    """In fp16 unless told, which is computed in fp32 on every machine."""
    base = variant.save(directory)
    file = base / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    (base / "config.json").write_text(json.dumps({**config, "dtype": name}))
    return base


@mostly_slow(with_experts())
def test_the_loss_is_the_whole_models_in_fp32(variant, tmp_path):
    base = stored(variant, tmp_path / "base")
    model = load_causal_lm(base, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        logits = model(windows()).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, windows()[:, 1:].flatten()).item()
    experts = Model.of(base).family.experts
    assert experts is not None
    with LayerStream(base, "cpu") as stream:
        shape = (SAMPLES, LENGTH, stream.hidden_size)
        with BoundaryPool(shape, stream.dtype, 10**9, tmp_path) as pool:
            found = streamed_loss(stream, windows(), pool, NullReporter())
        held = []
        for i in range(stream.num_layers):
            with stream.layer(i) as layer:
                present = dict(layer.module.named_parameters())
                held += [type(present[name]) for name in experts.parameters if name in present]
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(held) == {RaisedWeight}


def mixtral() -> Variant:
    return next(variant for variant in with_experts() if variant.model_type == "mixtral")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_that_are_no_narrower_are_held_as_they_are_computed(dtype, tmp_path):
    with LayerStream(stored(mixtral(), tmp_path / "base", dtype), "cpu") as stream:
        experts = stream.family.experts
        assert experts is not None
        with stream.layer(1) as layer:
            held = [layer.module.get_parameter(name) for name in experts.parameters]
    assert [(type(weight), weight.dtype) for weight in held] == [
        (torch.nn.Parameter, torch.float32)
    ] * len(experts.parameters)


def test_steps_on_a_layer_reach_its_experts(tmp_path):
    """In fp32: steps as small as these would vanish in 16 bits."""
    with LayerStream(stored(mixtral(), tmp_path / "base"), "cpu") as stream:
        hidden = torch.randn(2, LENGTH, stream.hidden_size)
        list(stream.embed(windows()[:2], 2))
        with stream.layer(1) as layer:
            experts = stream.family.experts
            assert experts is not None
            weights = [layer.module.get_parameter(name) for name in experts.parameters]
            before = [weight.detach().clone() for weight in weights]
            steps = BlockSteps(4, 1e-2)
            take_block_steps(layer, lambda _: (hidden, hidden * 2), 1, steps, seed=0)
            for weight, old in zip(weights, before, strict=True):
                assert weight.dtype == torch.float16
                assert not weight.requires_grad
                assert not torch.equal(weight.detach(), old)


def test_a_product_of_a_whole_weight_is_raised():
    weight = RaisedWeight(torch.randn(3, 4, 5).half(), torch.float32)
    states = torch.randn(3, 2, 4)
    expected = torch.bmm(states, weight.detach().float())
    assert torch.equal(torch.bmm(states, weight), expected)
    assert torch.equal(states @ weight, expected)
    assert torch.equal(weight[1], weight.detach()[1].float())
    assert weight.shape == (3, 4, 5)
