"""Groups ranked by what goes in and by the loss's gradients at what comes out."""

from pathlib import Path

import pytest
import torch

from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.output_gradients import OutputGradients
from loram_cli.pruning.column_scores import obs_scores
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.prune import stage as prune

pytestmark = pytest.mark.integration

SILENT = NullReporter()


def kept(base: Path, out: Path, text: Path, importance: str) -> dict:
    spec = prune.PruneSpec(
        model=base, out=out, strategy="stru", ratio=0.5, keep_first=1, keep_last=1,
        importance=importance, calibration=str(text), calibration_samples=8, calibration_length=24,
    )  # fmt: skip
    prune.run(spec, SILENT)
    return Manifest.read(out).keep


def test_gradients_weigh_what_obs_counts_alike(base, text_file, tmp_path, monkeypatch):
    by_obs = kept(base, tmp_path / "obs", text_file, "obs")
    by_both = kept(base, tmp_path / "surgeon", text_file, "surgeon")
    assert by_both != by_obs
    assert not (tmp_path / "surgeon" / "gradients").exists()
    again = kept(base, tmp_path / "again", text_file, "surgeon")
    assert again == by_both
    whole = OutputGradients.take

    def alike(self, name):
        return torch.eye(whole(self, name).shape[1])

    monkeypatch.setattr(OutputGradients, "take", alike)
    assert kept(base, tmp_path / "alike", text_file, "surgeon") == by_obs


def test_what_feeds_outputs_without_gradient_goes_first():
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((80, 6), (4, 6)))
    # Two columns reach the last two outputs only, strongly; the loss asks for the others.
    weight[:2, 4:], weight[2:, 4:] = 0, 5 * weight[2:, 4:]
    factor = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]))
    order = obs_scores(factor @ weight, x.T @ x, 6, dampening=1e-6).argsort().tolist()
    assert set(order[:2]) == {4, 5}
    assert set(obs_scores(weight, x.T @ x, 6, dampening=1e-6).argsort().tolist()[-2:]) == {4, 5}


def test_a_gradient_that_does_not_reach_names_the_other_importance(
    base, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda self, hook: None)
    with pytest.raises(LoramError, match="the loss's gradient does not reach it") as error:
        kept(base, tmp_path / "out", text_file, "surgeon")
    assert error.value.hint == "pass --importance obs"
    assert not (tmp_path / "out").exists()
