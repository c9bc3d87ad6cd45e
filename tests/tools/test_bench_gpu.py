"""The measurement of one GPU: rehearsed whole on the CPU, and its parts."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.gpu import command, tables, work
from benchmarks.gpu.checkpoints import await_checkpoint
from benchmarks.gpu.gather_wheels import PART_BYTES, Piece, plan_parts, write_parts
from benchmarks.gpu.install_wheels import join
from benchmarks.gpu.process import ROOT, Worker
from benchmarks.gpu.results import Outcome, Results
from benchmarks.gpu.rows import (
    CHECKPOINTS,
    GROUPS,
    Row,
    card_rows,
    chosen,
    needed_checkpoints,
    rehearsal_rows,
)
from benchmarks.gpu.work import KINDS

from loram_cli.arch.registry import family_for
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.training import training_memory
from loram_cli.tools.specs import BenchModel, BenchSpec

GIB = 2**30
KIT = ROOT / "tests" / "benchmarks" / "gpu"


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(240)
def test_the_whole_path_runs_on_a_cpu(tmp_path):
    for library in ("bitsandbytes", "lm_eval", "trl"):
        pytest.importorskip(library)
    words = [sys.executable, str(KIT), "--cpu-rehearsal", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("results-cpu-*.json")
    results = Results.read(file)
    assert list(results.rows) == [row.name for row in rehearsal_rows()]
    assert {row.status for row in results.rows.values()} == {"measured"}
    page = file.with_suffix(".md").read_text()
    assert all(f"{letter}) {title}" in page for letter, title in GROUPS.items())
    figures = {name: row.figures for name, row in results.rows.items()}
    assert figures["a1"]["scores"]["recovered"]["perplexity perplexity"] > 1
    assert figures["c1"]["label"] == "tiny QLoRAM 0.85"
    assert figures["e1"]["layers_that_stay"] > figures["e3"]["layers_that_stay"]
    for way in ("e2", "e3"):
        assert figures[way]["logits_sum"] == pytest.approx(figures["e1"]["logits_sum"], rel=1e-4)
    assert figures["g2"]["layers"] == 6
    streamed = figures["h1"]
    # Twice a step, but for the two at either end.
    moved = 2 * (streamed["streamed_layers"] - 2) * streamed["streamed_layer_bytes"]
    assert streamed["streamed_moved_bytes"] == moved and streamed["resident_moved_bytes"] == 0
    before, after = figures["g2"]["errors"][0]
    assert after < before


def test_rows_of_a_card_are_what_was_asked_for_in_order():
    rows = card_rows()
    letters = "".join(dict.fromkeys(row.name[0] for row in rows))
    assert letters == "fhgebca" and len({row.name for row in rows}) == len(rows)
    assert {row.kind for row in rows} == set(KINDS)
    # The demo, last, may be left out by the budget.
    assert sum(row.seconds for row in rows if row.kind != "demo") < 11 * 60
    for row in rows:
        if row.kind == "train":
            arguments = dict(row.arguments)
            spec = BenchSpec(rows=(arguments.pop("row"),), **arguments)
            assert BenchModel.parse(spec.rows[0]).config()["hidden_size"] >= 4096
    assert list(needed_checkpoints(rows)) == list(CHECKPOINTS)
    assert {row.kind for row in rehearsal_rows()} == set(KINDS)


def test_rows_can_be_chosen():
    rows = card_rows()
    assert [row.name for row in chosen(rows, ["e2", "g"])] == ["g1", "g2", "e2"]
    assert {row.name[0] for row in chosen(rows, ["d"])} == {"b", "c"}
    assert chosen(rows, []) == rows
    with pytest.raises(ValueError, match="no row x"):
        chosen(rows, ["x"])


def test_the_ratio_that_fits_is_the_one_memory_report_names(monkeypatch):
    (row,) = [row for row in card_rows() if row.kind == "fitted"]
    asked = {}
    monkeypatch.setattr(work, "train", lambda **arguments: asked.update(arguments))
    work.fitted(**row.arguments)
    model = BenchModel.parse(asked.pop("row"))
    assert (model.preset, model.quantize, model.multiple_of) == ("llama3.1-70b", "nf4", 64)
    assert 0.3 < model.ratio < 0.9
    family, config = family_for(model.config(), ""), model.config()
    setup = {name: asked[name] for name in asked if name not in ("steps", "device")}
    setup = TrainingSetup(**setup, quantize="nf4")
    assert training_memory(family, config, setup).fits(24 * GIB)


def results_of(*rows: Outcome) -> Results:
    return Results(
        card="NVIDIA H100 80GB HBM3",
        driver="580.1",
        card_memory="81559 MiB",
        date="2026-11-26",
        command="python tests/benchmarks/gpu",
        versions={"torch": "2.11.0"},
        rows={row.name: row for row in rows},
    )


def training(name, label, peak_gib, speed, *, saving, deviation=0.01) -> Outcome:
    figures = {
        "measured_bytes": int(peak_gib * GIB), "predicted_bytes": int(peak_gib * GIB),
        "deviation": deviation, "label": "x 0.6", "samples_per_second": speed, "gradient_checkpointing": saving,
    }  # fmt: skip
    return Outcome(
        name=name, label=label, status="measured", figures=figures, arguments={"length": 512}
    )


def test_bars_are_told_as_met_or_missed():
    results = results_of(
        training("b1", "13B LoRA", 50, 10, saving=False),
        training("b2", "13B LoRAM 0.65", 29, 13, saving=False),
        training("b3", "13B LoRA, chunked + checkpointing", 30, 8, saving=True),
        training("b4", "13B LoRAM 0.65 x64, chunked + checkpointing", 15, 12, saving=True),
        training("b5", "13B LoRAM 0.65, chunked + checkpointing", 17, 8, saving=True),
        training("c1", "70B QLoRAM 0.85", 13, 2, saving=True, deviation=-0.08),
        replace(
            training("c2", "Llama-3.1-70B for 24 GiB", 23, 2, saving=True),
            arguments={"memory": "24GiB", "length": 512},
        ),
    )
    page = tables.markdown(results)
    line = {
        row: next(x for x in page.splitlines() if x.startswith(f"| {row} ")) for row in results.rows
    }
    assert "1.39x of LoRA, has 1.30x: missed" in line["b2"] and "GiB:" not in line["b2"]
    assert "at most 16 GiB: met; 1.39x of LoRA, has 1.50x: met" in line["b4"]
    assert "at most 16 GiB: missed; 1.39x of LoRA, has 1.00x: missed" in line["b5"]
    assert "at most 12GiB: missed" in line["c1"] and "24 GiB (x 0.6) | 23.00 GiB" in line["c2"]
    assert "at most 24GiB: met" in line["c2"]
    deviations = page[page.index("d) predicted") :]
    assert "| c1 | 70B QLoRAM 0.85 | 13.00 GiB | 13.00 GiB | -8.0% | missed |" in deviations
    assert "+1.0% | met |" in deviations
    assert "NVIDIA H100 80GB HBM3 (81559 MiB), driver 580.1, 2026-11-26; torch 2.11.0" in page
    assert "`python tests/benchmarks/gpu`" in page


def test_a_row_without_figures_says_why():
    failed = Outcome(name="b1", label="7B LoRA", status="failed", why="out of memory | 80 GiB")
    page = tables.markdown(results_of(failed))
    assert "| b1 | 7B LoRA | failed: out of memory / 80 GiB | - | - | - |" in page
    assert "d) predicted" not in page


def test_figures_stay_when_a_later_run_has_none(tmp_path):
    first = results_of(training("b1", "7B LoRA", 29, 10, saving=False))
    file = first.write(tmp_path)
    assert file.name == "results-nvidia-h100-80gb-hbm3-2026-11-26.json"
    later = results_of()
    later.take_rows_of(file)
    later.add(Outcome(name="b1", label="7B LoRA", status="left out", why="no time"))
    later.add(Outcome(name="a1", label="demo", status="failed", why="x"))
    assert [(row.name, row.status) for row in later.rows.values()] == [
        ("a1", "failed"), ("b1", "measured"),
    ]  # fmt: skip


def test_tables_are_written_between_the_markers_of_both_pages(tmp_path, monkeypatch, capsys):
    pages = [tmp_path / "memory.md", tmp_path / "README.md"]
    for source, page in zip(command._PAGES, pages, strict=True):
        page.write_text(source.read_text())
    monkeypatch.setattr(command, "_PAGES", tuple(pages))
    results = results_of(training("b1", "7B LoRA", 29, 10, saving=False))
    file = results.write(tmp_path)
    for _ in range(2):  # a second time changes nothing
        assert command.main(["--write-docs", str(file)]) == 0
        told = ("29.00 GiB | 10.00 | 5120", "29.00 GiB | 29.00 GiB | 5120")
        for page, figures in zip(pages, told, strict=True):
            text = page.read_text()
            assert text.count(f"| b1 | 7B LoRA | {figures} |") == 1
            assert text.count(tables.START) == text.count(tables.END) == 1
            assert "No figure of a GPU stands here" not in text
    results.card = "cpu"
    assert command.main(["--write-docs", str(results.write(tmp_path))]) == 2
    assert "a rehearsal on the CPU" in capsys.readouterr().err


def test_without_a_gpu_it_says_how_to_rehearse(monkeypatch, capsys):
    monkeypatch.setattr(command.shutil, "which", lambda _: None)
    assert command.main([]) == 2
    assert "pass --cpu-rehearsal" in capsys.readouterr().err
    assert command.main(["--cpu-rehearsal", "--only", "x"]) == 2
    assert "no row x" in capsys.readouterr().err


class StandInWorker:
    """Fails at the second row, and never ends the third."""

    serves_more, used = True, False
    jobs: list[str] = []  # noqa: RUF012 - of one test

    def __init__(self, *_):
        pass

    def run(self, job, limit_seconds):
        name = Path(job["result"]).stem
        self.jobs.append(name)
        if name == "g1":
            Path(job["result"]).write_text(
                json.dumps({"figures": {"layers": 1, "seconds_per_layer": 2.0}})
            )
            return None
        if name == "g2":
            Path(job["result"]).write_text(json.dumps({"why": "RuntimeError: no"}))
            return None
        return f"not done within {limit_seconds:.0f} s"

    def end(self):
        pass


def test_a_row_that_fails_says_why_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "Worker", StandInWorker)
    rows = [
        Row(name=f"g{i}", label=f"row {i}", kind="train", seconds=seconds)
        for i, seconds in enumerate((20, 20, 20, 10_000), 1)
    ]
    flags = argparse.Namespace(
        out=tmp_path, cpu_rehearsal=True, process_per_row=False, budget_minutes=8.0
    )
    results = command._measure(rows, flags, tmp_path)
    assert StandInWorker.jobs == ["g1", "g2", "g3"]
    told = {name: (row.status, row.why) for name, row in results.rows.items()}
    assert told["g1"] == ("measured", None)
    assert told["g2"] == ("failed", "RuntimeError: no")
    assert told["g3"] == ("failed", "not done within 90 s")
    assert told["g4"][0] == "left out" and "takes about 10000 s" in told["g4"][1]
    (file,) = tmp_path.glob("results-*.json")
    assert Results.read(file).rows == results.rows
    assert "failed: RuntimeError: no" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.integration
def test_a_process_waits_for_its_row_and_is_ended_when_late(tmp_path):
    job = {"arguments": {}, "result": str(tmp_path / "r.json"), "log": str(tmp_path / "log")}
    worker = Worker(False, tmp_path / "workers.log")
    assert worker.run({**job, "kind": "no such kind"}, 60) is None
    assert "KeyError" in json.loads((tmp_path / "r.json").read_text())["why"]
    assert not worker.serves_more
    worker.end()
    late = Worker(False, tmp_path / "workers.log")
    # Nobody reads the pipe that it is to log into, so it waits for ever.
    os.mkfifo(tmp_path / "pipe")
    hanging = {**job, "kind": "train", "log": str(tmp_path / "pipe")}
    assert late.run(hanging, 0.5) == "not done within 0 s"


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path):
    assert "not written within 0 s" in await_checkpoint("13b", tmp_path, 0)
    (tmp_path / "13b.failed").write_text("OSError: needs 29 GiB of disk, and 1 are free")
    assert "needs 29 GiB of disk" in await_checkpoint("13b", tmp_path, 5)
    (tmp_path / "7b").mkdir()
    assert await_checkpoint("7b", tmp_path, 0) is None


def test_wheels_travel_in_parts_and_are_joined(tmp_path):
    there, here, wheels = tmp_path / "there", tmp_path / "here", tmp_path / "wheels"
    for folder in (there, here, wheels):
        folder.mkdir()
    sizes = {
        "large-1-py3-none-any.whl": 250,
        "middle-1-py3-none-any.whl": 70,
        "small-1-py3-none-any.whl": 30,
    }
    for name, size in sizes.items():
        (wheels / name).write_bytes(hashlib.sha512(name.encode()).digest() * 4)
        os.truncate(wheels / name, size)
    parts = plan_parts(list(sizes.items()), 100)
    assert parts == [
        [Piece("large-1-py3-none-any.whl", 0, 100)],
        [Piece("large-1-py3-none-any.whl", 100, 100)],
        [Piece("large-1-py3-none-any.whl", 200, 50), Piece("small-1-py3-none-any.whl", 0, 30)],
        [Piece("middle-1-py3-none-any.whl", 0, 70)],
    ]
    write_parts(parts, wheels, there)
    out = tmp_path / "joined"
    out.mkdir()
    whole, missing = join(there, out)
    assert not missing
    assert {file.name: file.read_bytes() for file in whole} == {
        name: (wheels / name).read_bytes() for name in sizes
    }
    # Only some parts have come, and one is damaged.
    (there / "wheels-2-of-4.bin").unlink()
    (there / "wheels-4-of-4.bin").write_bytes(b"x" * 70)
    whole, missing = join(there, here)
    assert [file.name for file in whole] == ["small-1-py3-none-any.whl"]
    assert [line.split(":")[0] for line in missing] == list(sizes)[:2]
    assert PART_BYTES <= 60 * 10**6
