"""Windows taken through the layers batch by batch, against the whole model."""

import pytest
import torch
from helpers.family_models import LENGTH, SAMPLES, windows

from loram_cli.modeling.layerwise import walk
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.load import load_causal_lm


class Sum:
    """A progress that adds up."""

    done = 0.0

    def advance(self, steps: float = 1) -> None:
        self.done += steps


def test_batches_reach_the_whole_models_hidden_states(base, tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "BATCH_TOKENS", 2 * LENGTH)
    progress = Sum()
    with torch.no_grad():
        expected = load_causal_lm(base)(windows(), output_hidden_states=True).hidden_states
    with LayerStream(base, "cpu") as stream:
        shape = (SAMPLES, LENGTH, stream.hidden_size)
        with BoundaryPool(shape, stream.dtype, 10**9, tmp_path) as pool:
            first = walk.embedded(stream, windows(), pool.new())
            assert first.starts == range(0, SAMPLES, 2)
            with stream.layer(0) as layer:
                second = first.pass_through(layer, progress, 0.5, into=pool.new())
            with stream.layer(1) as layer:
                third = second.pass_through(layer, progress)
            assert third is second
            for states, index in ((first, 0), (second, 2)):
                found = states.boundary.read(0, SAMPLES)
                torch.testing.assert_close(found, expected[index], rtol=1e-4, atol=1e-5)
    assert progress.done == pytest.approx(1.5)
