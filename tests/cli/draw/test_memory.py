"""The memory report as a reader sees it."""

import json
import re

import pytest

from loram_cli.cli.app import run_command
from loram_cli.cli.draw.memory import bar_lines
from loram_cli.memory.presets import load_preset
from loram_cli.reporting import NullReporter
from loram_cli.tools.memory_report import MemoryReportSpec, run
from loram_cli.units import GIB


def shown(capsys, *words):
    assert run_command(["memory-report", "--preset", "llama2-70b", *words]) == 0
    return capsys.readouterr().out


def test_tables_and_bars_stay_within_100_columns(capsys):
    lines = shown(capsys, "--fit", "24GiB").splitlines()
    tables = [line.rstrip() for line in lines if not line.startswith("- ")]
    assert max(map(len, tables)) <= 100
    assert any(re.match("stru 0.85 QLoRAM +█", line) for line in tables)


def test_fit_names_the_smallest_ratio_and_the_largest_micro_batch(capsys):
    text = shown(capsys, "--fit", "24GiB", "--gradient-checkpointing", "--ratio", "0.85")
    assert "24.00 GiB: LoRAM (rand, stru) fits" in text
    assert "24.00 GiB: QLoRAM (rand, stru) fits from ratio 0." in text
    assert "batch: the largest micro-batch in 24.00 GiB" in text
    assert "less memory" not in text


def test_a_memory_that_nothing_fits_is_said(capsys):
    text = shown(capsys, "--fit", "4GiB")
    assert "4.00 GiB: LoRAM fits at no ratio" in text
    assert "less memory: --gradient-checkpointing, --micro-batch 1\n" in text


def test_every_part_of_the_training_state_is_told(capsys):
    lines = shown(capsys, "--ratio", "0.85", "--rank", "16").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("training state in"))
    assert lines[at] == "training state in GiB: LoRA of rank 16, adamw"
    # 16 * (out + in) over all linears and the head; in fp32, twice, and two moments of it.
    assert lines[at + 4].split() == ["base", "207.74M", "0.77", "0.77", "1.55", "3.10"]


@pytest.mark.parametrize("amount", ["24", "0", "24 bananas"])
def test_a_forgotten_unit_is_not_taken_for_bytes(capsys, amount):
    assert run_command(["memory-report", "--preset", "llama2-7b", "--fit", amount]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_attention_is_what_the_model_trains_with(capsys, tmp_path):
    assert "512 tokens, sdpa attention, chunked cross-entropy" in shown(capsys)
    capped = {**load_preset("llama2-7b"), "attn_logit_softcapping": 50.0}
    (tmp_path / "config.json").write_text(json.dumps(capped))
    words = ["memory-report", "--model", str(tmp_path / "config.json"), "--ratio", "0.5"]
    assert run_command(words) == 0
    assert "512 tokens, eager attention" in capsys.readouterr().out


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
    totals = [row.training_bytes for row in (*result.rows, *result.streams)]
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
    assert "GiB" in shown(capsys, "--plot", str(tmp_path / "bars"))
    assert (tmp_path / "bars").read_bytes().startswith(b"\x89PNG")
    assert run_command([*words[:-1], str(tmp_path)]) == 1
    assert "cannot be written (Is a directory)" in capsys.readouterr().err


def test_ways_that_fit_are_told_fastest_first_with_their_commands(capsys):
    text = shown(capsys, "--fit", "24GiB", "--multiple-of", "64")
    ways = text[text.index("ways to train preset llama2-70b in 24.00 GiB") :]
    ranks = [line for line in ways.splitlines() if line[:5].strip(" .").isdigit()]
    names = [rank.split(":")[0].split(". ")[1] for rank in ranks]
    assert names[0] == "LoRAM 0.93" and names[1].startswith("QLoRAM 0.")
    assert names[2:] == ["stream QLoRA", "stream LoRA"] and "of RAM" in ranks[2]
    assert "loram train --on full --stream --quantize nf4 --offload-activations" in ways
    assert "     loram prune --ratio 0.93 --multiple-of 64\n     loram train --grad" in ways
    assert "then 'loram polish'" in ways
    small = shown(capsys, "--fit", "24GiB", "--batch", "1", "--tflops", "400", "--bus", "50")
    # With one example a step reading decides, and the disk is the slower.
    assert "layer by layer; without the RAM for it, as fast" in ways
    assert "without the RAM for it, as fast" not in small


def test_what_fits_whole_needs_neither_pruning_nor_streaming(capsys):
    assert run_command(["memory-report", "--preset", "llama2-7b", "--fit", "80GiB"]) == 0
    ways = capsys.readouterr().out.partition("ways to train")[2]
    assert "1. LoRA:" in ways and "2. QLoRA:" in ways and "3. " not in ways
    assert "there is nothing to prune" in ways and "loram polish" not in ways


def test_a_memory_that_no_way_fits_is_said(capsys):
    assert "no way to train preset llama2-70b fits 2.00 GiB" in shown(capsys, "--fit", "2GiB")


def test_the_common_cards_are_told_alone(capsys):
    lines = shown(capsys, "--cards", "--batch", "32").splitlines()
    assert lines[0] == "which way for my card: preset llama2-70b"
    assert "a step is 32 examples of 512 tokens" in lines[1]
    cells = [line.split() for line in lines]
    cards = [words[0] for words in cells if words[1:2] == ["GB"]]
    assert cards == ["8", "12", "16", "24", "40", "48", "80"]
    assert not any("weight memory" in line for line in lines)
