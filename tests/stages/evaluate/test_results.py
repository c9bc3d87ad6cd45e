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


def test_results_of_another_version_are_named():
    made = {"stage": "a later stage", "key": "k", "spec": {}, "inputs": {}, "base": {}}
    with pytest.raises(LoramError, match=r"loram.json of 'a later stage': its results cannot"):
        result_of(Manifest(**made, results={"other": 1}))
