"""The memory report as a reader sees it."""

import json

import pytest

from loram_cli.cli.app import run_command
from loram_cli.cli.memory_tables import bar_lines
from loram_cli.memory.presets import load_preset
from loram_cli.reporting import NullReporter
from loram_cli.stages.report import MemoryReportSpec, run
from loram_cli.units import GIB


def shown(capsys, *words):
    assert run_command(["memory-report", "--preset", "llama2-70b", *words]) == 0
    return capsys.readouterr().out


def test_tables_and_bars_stay_within_100_columns(capsys):
    lines = shown(capsys, "--fit", "24GiB").splitlines()
    tables = [line.rstrip() for line in lines if not line.startswith("- ")]
    assert max(map(len, tables)) <= 100
    assert any(line.startswith("stru 0.85 QLoRAM █") for line in tables)


def test_fit_names_the_smallest_ratio_and_the_largest_micro_batch(capsys):
    text = shown(capsys, "--fit", "24GiB", "--gradient-checkpointing", "--ratio", "0.85")
    assert "24.00 GiB: LoRAM (rand, stru) fits" in text
    assert "24.00 GiB: QLoRAM (rand, stru) fits from ratio 0." in text
    assert "fits: the largest micro-batch" in text


def test_a_memory_that_nothing_fits_is_said(capsys):
    text = shown(capsys, "--fit", "4GiB")
    assert "4.00 GiB: LoRAM fits at no ratio" in text


def test_ratio_that_is_named_fits_and_one_hundredth_less_does_not():
    def training_bytes(ratio):
        rows = run(MemoryReportSpec(preset="llama2-13b", ratios=(ratio,)), NullReporter()).rows
        [row] = [r for r in rows if (r.precision, r.ratio) == ("bf16", ratio)]
        return row.training_bytes

    fits = run(MemoryReportSpec(preset="llama2-13b", fit_bytes=40 * GIB), NullReporter()).fits
    ratio = fits[0].ratio
    assert fits[0].training_bytes == training_bytes(ratio) <= 40 * GIB * 0.95
    assert training_bytes(round(ratio - 0.01, 2)) > 40 * GIB * 0.95


def test_a_model_on_the_hub_gives_its_config_alone(monkeypatch, tmp_path, capsys):
    asked = []

    def snapshot_download(model, *, allow_patterns, local_files_only):
        asked.append((model, allow_patterns))
        config = {**load_preset("llama2-7b"), "num_hidden_layers": 8}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("loram_cli.checkpoint.sources.unreachable", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert run_command(["memory-report", "--model", "some/model", "--ratio", "0.5"]) == 0
    assert asked == [("some/model", ["config.json"])]
    assert "stru 0.5 QLoRAM" in capsys.readouterr().out


def test_bars_are_on_one_scale():
    result = run(MemoryReportSpec(preset="llama2-13b", ratios=(0.65,)), NullReporter())
    *bars, legend = bar_lines(result, tuple("wsalc"))
    lengths = [sum(bar.split()[-3].count(c) for c in "wsalc") for bar in bars]
    totals = [row.training_bytes for row in result.rows]
    assert lengths[0] == 60
    for length, total in zip(lengths, totals, strict=True):
        assert length == pytest.approx(60 * total / max(totals), abs=0.6)
    assert "w weights" in legend


def test_picture_is_written_and_another_ending_refused(tmp_path, capsys):
    assert "GiB" in shown(capsys, "--plot", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    words = ["memory-report", "--preset", "llama2-7b", "--plot", str(tmp_path / "bars.xyz")]
    assert run_command(words) == 1
    assert "name it x.png" in capsys.readouterr().err
