import subprocess
import sys
from pathlib import Path

import pytest

from loram_cli import api

pytestmark = pytest.mark.integration


def test_the_stages_run_from_python(base: Path, instructions: Path, tmp_path: Path):
    keep = {"keep_first": 1, "keep_last": 1, "ratio": 0.5, "strategy": "rand"}
    pruned = api.prune(api.PruneSpec(model=base, out=tmp_path / "pruned", **keep))
    assert pruned.fresh
    fit = {"steps": 1, "batch": 2, "micro_batch": 2, "max_length": 64}
    spec = api.TrainSpec(
        source=pruned.wrote, out=tmp_path / "adapter", data=str(instructions), **fit
    )
    trained = api.train(spec)
    places = {"adapter": trained.wrote, "model": base, "out": tmp_path / "recovered"}
    recovered = api.recover(api.RecoverSpec(**places))
    assert api.verify(api.VerifySpec(directory=recovered.wrote)).problems == ()
    assert api.inspect(recovered.wrote).stage == "recover"
    with pytest.raises(api.UsageError):
        api.PruneSpec(model=base, out=tmp_path, ratio=2.0)


def test_every_exported_name_is_there_and_torch_is_not():
    code = (
        "import sys; from loram_cli import api\n"
        "missing = [n for n in api.__all__ if not hasattr(api, n)]\n"
        "assert not missing, missing\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
