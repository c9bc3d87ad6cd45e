"""The scripts of ``make bench*`` start from any folder; nothing collects them as tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).with_name("benchmarks")
# A folder with a __main__.py is started as a script is.
SCRIPTS = sorted(
    [file for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text()]
    + [file.parent for file in BENCHMARKS.glob("*/__main__.py")]
)
# One process for all of them, since each would import torch anew.
HELP = """
import runpy, sys
folder, *scripts = sys.argv[1:]
sys.path[0] = folder
for script in scripts:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    else:
        raise AssertionError(f"{script} ran instead of helping")
"""


@pytest.mark.integration
def test_every_script_has_a_help():
    words = [sys.executable, "-W", "ignore", "-c", HELP, str(BENCHMARKS), *map(str, SCRIPTS)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS) >= 10


def test_make_benches_name_scripts_that_exist():
    makefile = (BENCHMARKS.parents[1] / "Makefile").read_text()
    named = {word.split("/")[-1] for word in makefile.split() if word.startswith("$(BENCHMARKS)/")}
    assert named
    assert named <= {script.name for script in SCRIPTS}


def test_gain_kept_is_a_share_of_full_loras(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gain.report import cells, merged, table

    common = {"bytes": 1.0, "predicted_peak_bytes": 2**30, "train_seconds": 60, "ppl_recovered": 20}
    full = {
        **common, "name": "full", "seed": 1, "loss_base": 1.5, "ppl_base": 18.0,
        "loss_before": 1.5, "loss_small": 0.9, "loss_recovered": 0.9, "loss_polished_10": 1.4,
    }  # fmt: skip
    small = {
        **common, "name": "stru-0.65-distill", "seed": 1, "bytes": 0.54, "align_tokens": 114688,
        "align_seconds": 300, "loss_before": 1.6, "loss_small": 1.2, "loss_recovered": 1.05,
    }  # fmt: skip
    stray = {**small, "seed": 7}
    # A second seed, without exact steps, leaves those of the first.
    again = {**{k: v for k, v in full.items() if "polished" not in k}, "seed": 2}
    rows = merged({"full@1": full, "small@1": small, "small@7": stray})
    assert [(row["name"], round(row["kept"], 6)) for row in rows] == [
        ("full", 1.0), ("stru-0.65-distill", 0.75),
    ]  # fmt: skip
    lines = table(cells(rows)).splitlines()
    assert [line.count("|") for line in lines] == [15] * 5
    assert "| 0.75 |" in lines[-1] and "| 115k |" in lines[-1]
    # A scaled update counts where there is one.
    scaled = {**small, "scale": 1.7, "loss_scaled": 0.96, "ppl_scaled": 21.0}
    last = table(cells(merged({"full@1": full, "small@1": scaled}))).splitlines()[-1]
    assert "| 1.050 | 1.70 | 0.960 | 0.90 | 21.0 |" in last
    # Ten exact steps alone keep a sixth; a seed that took none leaves that as it is.
    assert lines[-2].endswith("| 0.17 |")
    assert merged({"full@1": full, "full@2": again})[0]["kept_10"] == pytest.approx(1 / 6)


def test_rows_measured_elsewhere_stay_on_the_page(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gain.report import _BLOCK, parsed, write_report

    page = tmp_path / "gain.md"
    page.write_text(
        "before\n<!-- bench-gain A -->\n| small model | bytes | kept | + 2 exact |\n|---|---|---|---|\n"
        "| NF4 (QLoRA) | 0.26 | 0.90 ±0.00 | 0.95 |\n| base |  |  |  |\n<!-- /bench-gain -->\n"
        "between\n<!-- bench-gain B -->\n<!-- /bench-gain -->\nafter\n"
    )
    done = {
        "full@1": {
            "name": "full", "seed": 1, "bytes": 1.0, "predicted_peak_bytes": 2**30, "train_seconds": 60,
            "loss_base": 1.5, "ppl_base": 18.0, "loss_before": 1.5, "loss_small": 0.9,
            "loss_recovered": 0.9, "loss_polished_10": 1.4, "ppl_recovered": 20,
        }
    }  # fmt: skip
    for base in ("A", "B", "A"):
        write_report(done, base, tmp_path, docs=True)
    text = page.read_text()
    assert text.startswith("before\n") and "-->\nbetween\n<!--" in text and text.endswith("after\n")
    one, other = (parsed(block["table"]) for block in _BLOCK.finditer(text))
    assert [row["small model"] for row in one] == ["base", "full LoRA", "NF4 (QLoRA)"]
    assert (one[0]["before"], one[1]["+ 10 exact"], one[2]["+ 2 exact"]) == (
        "1.500",
        "0.17",
        "0.95",
    )
    assert [row["small model"] for row in other] == ["base", "full LoRA"]
    assert (tmp_path / "gain.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no table between marks of C"):
        write_report(done, "C", tmp_path, docs=True)


def test_a_vocabulary_without_unused_tokens_splits_text_as_before(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from safetensors.torch import load_file, save_file
    from second_base import _ALWAYS, trim
    from tokenizers import AddedToken, Tokenizer, models

    names = [*_ALWAYS, "<unused>", *(f"<0x{i:02X}>" for i in range(256)), *"abcdexyz"]
    merges = [("x", "y"), ("xy", "z"), ("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c")]
    vocab = {token: i for i, token in enumerate([*names, *map("".join, merges)])}
    whole = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    whole.add_special_tokens([AddedToken(t, special=True) for t in (*_ALWAYS, "<unused>")])
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    whole.save(str(before / "tokenizer.json"))
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        (before / name).write_text(json.dumps({"vocab_size": len(vocab)}))
    rows = torch.arange(len(vocab))[:, None].float()
    save_file({"model.embed_tokens.weight": rows}, before / "model.safetensors")

    trim(before, after, ["abcde", "edcbc"])
    cut = Tokenizer.from_file(str(after / "tokenizer.json"))
    for text in ("abcde", "edcbc<eos>", "é"):
        assert cut.encode(text).tokens == whole.encode(text).tokens
    left = cut.get_vocab()
    assert {"ab", "cd", "abcd", "bc", "<mask>"} <= set(left)
    assert not {"xy", "xyz", "x", "<unused>"} & set(left)
    # Each token has the row that it had.
    kept = load_file(after / "model.safetensors")["model.embed_tokens.weight"]
    assert {token: int(kept[i]) for token, i in left.items()} == {t: vocab[t] for t in left}
    assert json.loads((after / "config.json").read_text())["vocab_size"] == len(left) == len(kept)


def test_names_of_points_lie_on_nothing_else(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gain.report import _free_place, _overlap

    taken = []
    for i in range(12):
        taken.append(_free_place(0.5, 0.9 + i / 500, "stru-0.65-obs", taken))
    pairs = [(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert not any(_overlap(*pair) for pair in pairs)


def test_a_row_is_measured_no_further_than_it_has_to_be(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gain import command
    from gain.rows import named

    monkeypatch.setattr(command, "measure", lambda row, seed, bench: {"loss_recovered": 1.0})
    monkeypatch.setattr(command, "measure_scaled", lambda row, seed, bench: {"loss_scaled": 1.0})
    monkeypatch.setattr(command, "measure_polished", lambda row, seed, bench, steps: {steps: 1.0})
    (decisive,), (plain,) = named(("lowbit-3",)), named(("stru-0.65-wanda",))

    def found(row, known):
        return list(command._measured(row, 1, None, (2, 10), known))

    assert found(plain, {}) == [{"loss_recovered": 1.0}]
    assert found(decisive, {}) == [{"loss_recovered": 1.0}, {2: 1.0}, {10: 1.0}]
    (scaled,) = named(("stru-0.65-obs",))
    assert found(scaled, {"loss_recovered": 1.0}) == [{"loss_scaled": 1.0}, {2: 1.0}, {10: 1.0}]
    known = {"loss_recovered": 1.0, "loss_polished_2": 1.2}
    assert found(decisive, known) == [{10: 1.0}]


def test_a_rows_settings_reach_the_products_table(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gain.frontier import write_frontier

    common = {"seed": 1, "loss_before": 1.5, "loss_small": 1.0}
    done = {
        "full@1": {**common, "name": "full", "bytes": 1.0, "loss_base": 1.5, "loss_recovered": 0.9},
        "nf4@1": {**common, "name": "nf4", "bytes": 0.26, "loss_recovered": 0.96},
        "b@1": {**common, "name": "stru-0.65-obs", "bytes": 0.54, "loss_recovered": 1.05},
        "c@1": {**common, "name": "stru-0.35-lowbit-2", "bytes": 0.1, "loss_recovered": 1.2},
        # Made in more time, and no better beyond what another seed changes.
        "d@1": {**common, "name": "stru-0.65-obs-131k", "bytes": 0.54, "loss_recovered": 1.047},
    }
    write_frontier(done, "SmolLM2", tmp_path / "frontier.json")
    written = json.loads((tmp_path / "frontier.json").read_text())
    assert written["base"] == "SmolLM2"
    full, nf4, stru = written["points"]  # the last one takes two prunings, and is left out
    assert (full["prune"], full["kept"], nf4["quantize"], nf4["kept"]) == ({}, 1.0, "nf4", 0.9)
    assert stru["prune"] == {"strategy": "stru", "ratio": 0.65, "importance": "obs"}
    assert (stru["align"], stru["bytes"], stru["kept"]) == ("reconstruct", 0.54, 0.75)


def test_emlocs_correction_acts_as_the_small_weight_where_lora_reads(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from recovery_trials import emloc, refit

    from loram_cli.lora.adapter import LoraPair

    torch.manual_seed(0)
    pair = LoraPair(torch.randn(2, 7), torch.randn(5, 2))
    full, small = torch.randn(5, 7), torch.randn(5, 7)
    x = pair.lora_a.T @ torch.randn(2, 3)
    wanted = (small + 2.0 * pair.lora_b @ pair.lora_a) @ x
    freely = emloc(pair, 2.0, full - small, limit=1e9)
    torch.testing.assert_close((full + 2.0 * freely @ pair.lora_a) @ x, wanted)
    # With a limit, the correction is short, and none at a limit of zero.
    torch.testing.assert_close(emloc(pair, 2.0, full - small, limit=0.0), pair.lora_b)
    small_step = emloc(pair, 2.0, full - small, limit=0.1) - pair.lora_b
    assert 0 < small_step.norm() < (freely - pair.lora_b).norm()
    read = torch.randn(50, 2)
    found = refit(torch.zeros(5, 2), read, read @ pair.lora_b.T)
    torch.testing.assert_close(found.float(), pair.lora_b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_corrections_leave_an_adapter_of_the_base_itself_as_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import recovery_trials

    from loram_cli.reporting import NullReporter
    from loram_cli.runs.rundir import demo_base
    from loram_cli.stages.prune import stage as prune
    from loram_cli.stages.train import stage as train

    base, pruned, whole, narrow = demo_base(), *(tmp_path / n for n in ("p", "whole", "narrow"))
    silent = NullReporter()
    spec = prune.PruneSpec(
        model=base, out=pruned, strategy="rand", ratio=0.5, keep_first=1, keep_last=1
    )
    prune.run(spec, silent)
    for source, out in ((base, whole), (pruned, narrow)):
        settings = {"steps": 4, "learning_rate": 2e-3, "warmup_steps": 1, "max_length": 96}
        data = {"data": "demo:train", "eval_data": "demo:validation", "eval_examples": 4}
        train.run(train.TrainSpec(source=source, out=out, **data, **settings), silent)
    words = [
        "recovery_trials", str(whole), str(narrow), "--base", str(base), "--full", str(whole),
        "--eval-data", "demo:validation", "--eval-examples", "8", "--fit-examples", "8",
        "--scale-examples", "0",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    recovery_trials.main()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()[2:]
    ]
    ways = ["none", "emloc", "inputs", "moves"]
    assert [row[:2] for row in rows[2:]] == [
        [name, way] for name in ("whole", "narrow") for way in ways
    ]
    before, full = (float(row[2]) for row in rows[:2])
    assert full < before
    assert [float(row[2]) for row in rows[2:6]] == pytest.approx([full] * 4, abs=2e-3)
    # Its kept weights are the base's, so that EMLoC's has nothing to add; what runs through differs.
    none, emloc, inputs, moves = (float(row[2]) for row in rows[6:])
    assert emloc == pytest.approx(none, abs=2e-4)
    assert none not in (inputs, moves)
