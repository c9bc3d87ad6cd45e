import shutil
from dataclasses import replace

import pytest
import torch
from helpers.factors import trained
from helpers.slow import slow

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import NullReporter
from loram_cli.stages.train.spec import TrainSpec
from loram_cli.training.loop.checkpoints import fingerprint
from loram_cli.training.loop.compiled import compiled_layers
from loram_cli.training.loop.loop import fit_lora
from loram_cli.training.loop.options import FitOptions

pytestmark = pytest.mark.integration

OPTIONS = FitOptions(
    learning_rate=5e-3, steps=3, batch=4, micro_batch=2, warmup_steps=1, checkpoint_steps=9, seed=7
)
COMPILED = replace(OPTIONS, compile_layers=True)
SPEC = {"source": "in", "out": "out", "data": "data.jsonl"}


@pytest.fixture
def with_backend(monkeypatch):
    """Have layers compiled by another backend of torch's; returns the layers, as they come."""
    compile_module = torch.nn.Module.compile
    seen = []

    def take(backend):
        def compile_by(module):
            seen.append(module)
            compile_module(module, backend=backend)

        monkeypatch.setattr(torch.nn.Module, "compile", compile_by)
        return seen

    return take


def fitted(model, rows, options, folder):
    result = fit_lora(model, rows[:12], rows[12:16], options, folder, NullReporter())
    return [row.loss for row in result.history]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_learn_the_same(with_lora, rows, tmp_path, with_backend, checkpointing):
    plain, compiled = with_lora(dropout=0.0), with_lora(dropout=0.0)
    losses = fitted(plain, rows, OPTIONS, tmp_path / "a")
    seen = with_backend("aot_eager")
    options = replace(COMPILED, gradient_checkpointing=checkpointing)
    assert fitted(compiled, rows, options, tmp_path / "b") == pytest.approx(losses, abs=1e-5)
    assert seen == list(compiled.base_model.model.model.layers)
    for layer in seen:  # itself again
        assert layer._compiled_call_impl is None
    for name, factor in trained(plain).items():
        torch.testing.assert_close(trained(compiled)[name], factor, atol=1e-4, rtol=1e-3)


def test_nothing_is_compiled_unless_asked_for(with_lora, rows, tmp_path, with_backend):
    seen = with_backend("aot_eager")
    fitted(with_lora(), rows, OPTIONS, tmp_path)
    assert seen == []


def test_layers_that_cannot_be_compiled_are_an_error_of_two_lines(
    with_lora, rows, tmp_path, with_backend
):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    seen = with_backend(broken)
    with pytest.raises(LoramError, match=r"cannot compile .*no C\+\+ compiler here") as caught:
        fitted(with_lora(), rows, COMPILED, tmp_path)
    assert "leave out --compile" in (caught.value.hint or "")
    assert str(caught.value).count("\n") == 1  # what, and what to do
    assert seen[0]._compiled_call_impl is None


def test_more_shapes_than_torch_would_compile_are_compiled(with_backend):
    from transformers.modeling_layers import GradientCheckpointingLayer

    shapes = []

    def count(graph, inputs):
        shapes.append(graph)
        return graph.forward

    class Layer(GradientCheckpointingLayer):
        def __init__(self, width):
            super().__init__()
            self.linear = torch.nn.Linear(8, width)

        def forward(self, hidden):
            return self.linear(hidden)

    with_backend(count)
    model = torch.nn.ModuleList(Layer(width) for width in range(2, 22))
    with compiled_layers(model, True):
        for layer in model:
            layer(torch.zeros(1, 8))
    assert len(shapes) >= 20 > torch._dynamo.config.recompile_limit


def test_a_checkpoint_serves_compiled_and_plain_layers():
    first, second = (
        fingerprint(options, "fp32", "d", {"w": (1,)}, False) for options in (OPTIONS, COMPILED)
    )
    assert first == second


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"stream": True}, "--compile does not go with --stream"),
        ({"fsdp": True}, "--compile does not go with --fsdp"),
        ({"objective": "dpo"}, "--compile does not go with --objective dpo"),
    ],
)
def test_what_it_does_not_go_with(settings, why):
    with pytest.raises(UsageError, match=why):
        TrainSpec(**SPEC, compile=True, **settings)


@slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own backend needs g++ on a CPU")
def test_the_real_backend_learns_the_same(with_lora, rows, tmp_path):
    plain, compiled = with_lora(dropout=0.0), with_lora(dropout=0.0)
    losses = fitted(plain, rows, OPTIONS, tmp_path / "a")
    assert fitted(compiled, rows, COMPILED, tmp_path / "b") == pytest.approx(losses, abs=1e-4)
