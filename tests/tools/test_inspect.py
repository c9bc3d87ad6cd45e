import json
from pathlib import Path

import pytest

from loram_cli.cli.app import run_command
from loram_cli.cli.draw.inspection import layer_lines
from loram_cli.errors import LoramError
from loram_cli.tools.inspect import LayerWidth, inspect


def test_a_pruned_model_shows_its_widths(finished_run: Path, capsys):
    assert run_command(["inspect", str(finished_run / "pruned")]) == 0
    out = capsys.readouterr().out
    assert "llama checkpoint, made by 'prune'" in out
    bars = [line for line in out.splitlines() if "█" in line]
    assert [line.count("█") for line in bars] == [40, 20, 20, 40]
    assert bars[1].endswith("4/2 heads, 20 channels")


def test_plain_models_and_adapters_need_no_manifest(base: Path, run_copy: Path, capsys):
    plain = inspect(base)
    assert (plain.kind, plain.stage, plain.family) == ("checkpoint", None, "llama")
    assert [layer.kept_share for layer in plain.layers] == [1.0] * 4
    (run_copy / "recovered" / "loram.json").unlink()
    adapter = inspect(run_copy / "recovered")
    assert adapter.kind == "adapter"
    assert adapter.adapter["r"] == 8
    assert adapter.adapter["modules"] == 29
    assert adapter.base == str(base)


def test_a_run_lists_its_stages(finished_run: Path, capsys):
    assert run_command(["inspect", str(finished_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = [output["stage"] for output in found["outputs"]]
    assert stages == ["prune", "align", "train", "recover", "merge", "eval"]
    assert found["outputs"][2]["results"]["steps"] == 2


def test_a_model_that_is_no_decoder_of_ours_is_still_described(base: Path, tmp_path: Path):
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "odd"}')
    (odd / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    found = inspect(odd)
    assert found.family == "odd"
    assert found.params == inspect(base).params
    assert found.layers == ()


def test_what_is_nothing_is_refused(tmp_path: Path):
    with pytest.raises(LoramError, match="neither a run"):
        inspect(tmp_path)


def test_like_layers_of_a_deep_model_share_a_bar():
    wide, narrow = (8, 4, 320, 1.0), (2, 1, 48, 0.2)
    layers = tuple(LayerWidth(i, *(narrow if 4 <= i < 30 else wide)) for i in range(32))
    names = [line.split()[0] for line in list(layer_lines(layers))[1:]]
    assert names == ["0-3", "4-29", "30-31"]
