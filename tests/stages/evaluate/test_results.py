import json

import pytest

from loram_cli.errors import LoramError
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.core.results import result_of
from loram_cli.stages.evaluate.results import read_results


@pytest.mark.parametrize("value", [{"rows": 3}, {"rows": {"base": 3}}, {"rows": [1]}])
def test_results_that_were_changed_are_named(value, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(value))
    with pytest.raises(LoramError, match=r"results\.json: no results of an evaluation"):
        read_results(tmp_path)


@pytest.mark.parametrize("stage", ["train", "a later stage"])
def test_results_of_another_version_are_named(stage):
    manifest = Manifest(stage=stage, key="k", spec={}, inputs={}, base={}, results={"other": 1})
    with pytest.raises(LoramError, match=f"loram.json of '{stage}': its results cannot be read"):
        result_of(manifest)
