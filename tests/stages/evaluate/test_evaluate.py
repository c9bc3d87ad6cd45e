import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.reporters import WarningRecorder
from helpers.tiny_models import make_base

from loram_cli.checkpoint.model import Model
from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation import models
from loram_cli.evaluation.samples import load_documents
from loram_cli.reporting import NullReporter
from loram_cli.stages.evaluate import rows as eval_rows
from loram_cli.stages.evaluate import stage as evaluate
from loram_cli.stages.evaluate.stage import EvalSpec

SILENT = NullReporter()


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("other"), seed=3)


@pytest.fixture
def spec_of(base, other, instructions, tmp_path):
    def build(**changes):
        settings = {
            "model": base,
            "out": tmp_path / "eval",
            "rows": {"base": (base,), "other": (other,)},
            "tasks": ("lm_eval:gsm8k", "perplexity"),
            "task_data": {"lm_eval:gsm8k": instructions, "perplexity": instructions},
            "num_fewshot": 0,
            "limit": 6,
            "max_new_tokens": 6,
            "replace": True,
        }
        return EvalSpec(**{**settings, **changes})

    return build


@pytest.fixture
def loads(monkeypatch):
    """Models that were loaded, in order."""
    seen = []
    load = models.load_causal_lm

    def recorded(model, **options):
        seen.append(model.directory)
        return load(model, **options)

    monkeypatch.setattr(models, "load_causal_lm", recorded)
    return seen


def test_same_inputs_are_done_already_and_changed_ones_are_not(
    spec_of, loads, base, other, tmp_path, instructions
):
    first = evaluate.run(spec_of(), SILENT)
    assert first.fresh
    assert loads == [base, other]
    again = evaluate.run(spec_of(batch_size=3), SILENT)  # speed is no part of the question
    assert (again.fresh, again.manifest.results) == (False, first.manifest.results)
    assert len(loads) == 2

    # Another question asks only what was not asked: here six prompts of six tokens more.
    more = evaluate.run(spec_of(limit=8), SILENT)
    assert more.fresh
    assert len(loads) == 4
    back = evaluate.run(spec_of(), SILENT)  # nothing new: no model is loaded
    assert back.fresh
    assert back.manifest.results == first.manifest.results
    assert len(loads) == 4

    # Another model under the same row name is another input.
    swapped = evaluate.run(spec_of(rows={"base": (base,), "other": (base,)}), SILENT)
    rows = swapped.manifest.results["rows"]
    assert (
        rows["other"]["scores"]
        == rows["base"]["scores"]
        != first.manifest.results["rows"]["other"]["scores"]
    )

    changed = tmp_path / "changed.jsonl"
    changed.write_text(instructions.read_text().replace("plus", "and"))
    data = {"lm_eval:gsm8k": changed, "perplexity": changed}
    assert evaluate.run(spec_of(task_data=data), SILENT).fresh
    forced = evaluate.run(spec_of(force=True), SILENT)
    assert forced.fresh
    assert forced.manifest.results == first.manifest.results


def test_a_model_that_does_not_fit_is_read_layer_by_layer_and_answers_the_same(
    spec_of, loads, monkeypatch
):
    reporter = WarningRecorder()
    whole = evaluate.run(spec_of(), SILENT)
    assert len(loads) == 2
    small = spec_of(weights_memory=160_000, force=True)
    assert evaluate.run(small, reporter).manifest.results == whole.manifest.results
    assert len(loads) == 2
    assert len(reporter.warnings) == 2
    assert "base: its weights take 205.88 KiB, and there are 156.25 KiB" in reporter.warnings[0]
    assert "4 of 4 layers are read anew at every pass" in reporter.warnings[0]
    # Unless told, what is free decides, less what the passes want.
    monkeypatch.setattr(models, "free_memory_bytes", lambda _: 10**9)
    evaluate.run(spec_of(force=True), SILENT)
    assert len(loads) == 4
    monkeypatch.setattr(models, "free_memory_bytes", lambda _: 200 * 2**10)
    with pytest.raises(
        LoramError, match=r"two decoder layers take .* there are 100\.00 KiB"
    ) as told:
        evaluate.run(spec_of(force=True), SILENT)
    assert "--quantize nf4" in told.value.hint


def test_answers_in_4_bits_are_other_answers(spec_of):
    whole = evaluate.run(spec_of(), SILENT).manifest.results["rows"]
    spec = spec_of(quantize="nf4")
    assert evaluate.plan(spec, SILENT).memory_bytes < evaluate.plan(spec_of(), SILENT).memory_bytes
    quantized = evaluate.run(spec, SILENT).manifest.results["rows"]
    assert quantized["base"]["scores"] != whole["base"]["scores"]
    # Neither is taken for the other's.
    assert evaluate.run(spec_of(), SILENT).manifest.results["rows"] == whole
    again = spec_of(quantize="nf4", weights_memory=150_000, force=True)
    assert evaluate.run(again, SILENT).manifest.results["rows"] == quantized


def test_without_replace_other_results_are_kept(spec_of):
    evaluate.run(spec_of(replace=False), SILENT)
    with pytest.raises(UsageError, match="--force"):
        evaluate.run(spec_of(replace=False, limit=3), SILENT)


def test_an_adapters_scaling_is_an_input(base, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    digests = []
    for alpha, named in ((16, "a"), (16, "b"), (32, "a")):
        config = {"lora_alpha": alpha, "base_model_name_or_path": named}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        record = eval_rows.eval_inputs({"r": (base, adapter)}, {base: Model.open(base)}, [])[
            "row r"
        ]
        digests.append(record["adapter_config"])
    assert digests[0] == digests[1] != digests[2]


def test_results_are_exported_and_outputs_shown(spec_of, tmp_path, capsys):
    result = evaluate.run(spec_of(), SILENT)
    names = {path.name for path in result.wrote.iterdir()}
    assert {"results.json", "results.md", "results.csv", "results.png", "loram.json"} <= names
    assert {"samples-base.jsonl", "samples-other.jsonl"} <= names
    table = (result.wrote / "results.md").read_text().splitlines()
    assert table[0] == "### held-out results"
    assert table[2] == "| model | lm_eval:gsm8k strict | lm_eval:gsm8k flexible | perplexity |"
    assert table[4].startswith("| base | ")
    lines = (result.wrote / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert (result.wrote / "results.png").read_bytes()[:4] == b"\x89PNG"

    evaluate.export_results(result, tmp_path / "deep" / "table.md")
    assert (tmp_path / "deep" / "table.md").read_text().splitlines() == table
    with pytest.raises(UsageError, match=r"\.md, \.csv"):
        evaluate.export_results(result, tmp_path / "table.xls")

    documents = load_documents(result.wrote)
    assert len(documents) == 6
    assert list(documents[0].outputs) == ["base", "other"]
    words = ["eval", "--out", str(result.wrote), "--show", "-n", "2"]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert out.count("right answer: #### ") == 2
    assert "base: wrong" in out
    assert "other: wrong" in out
    assert run_command([*words, "--only", "right", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run_command([*words, "--task", "humaneval"]) == 2
    assert "no samples of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be above 0, not 0"),
        ({"batch_size": "many"}, "--batch-size many"),
        ({"limit": 0}, "--limit"),
        ({"code_samples": 0}, "--code-samples"),
        ({"rows": {"../x": ()}}, "row '../x'"),
        ({"rows": {}}, "no row"),
        ({"backend": "vllm"}, "vLLM is not installed"),
        ({"backend": "vllm", "quantize": "nf4"}, "--quantize is for --backend hf"),
        ({"backend": "vllm", "weights_memory": 9}, "--weights-memory is for --backend hf"),
        ({"weights_memory": 0}, "--weights-memory must be above 0"),
    ],
)
def test_senseless_settings_are_refused(spec_of, changes, message, monkeypatch):
    from loram_cli.evaluation import vllm_backend

    monkeypatch.setattr(vllm_backend, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=message):
        evaluate.run(spec_of(**changes), SILENT)


def test_a_dry_run_refuses_memory_that_no_layer_fits(spec_of):
    with pytest.raises(LoramError, match="embedding, head and two decoder layers take") as caught:
        evaluate.plan(spec_of(weights_memory=1000), SILENT)
    assert caught.value.hint == "pass a larger --weights-memory, or --quantize nf4"
    assert evaluate.plan(spec_of(weights_memory=160_000), SILENT).work is not None


@pytest.mark.parametrize(
    ("task", "record", "told"),
    [
        ("gsm8k", {"question": "q"}, "field 'answer' of gsm8k_cot is missing"),
        ("hellaswag", {"endings": "["}, "is not in the layout of hellaswag"),
        ("perplexity", {"foo": 1}, "no known layout"),
    ],
)
def test_a_dry_run_reads_the_documents(spec_of, tmp_path, task, record, told):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(record) + "\n")
    spec = spec_of(tasks=(task,), task_data={task: data})
    with pytest.raises(LoramError, match=f"--task-data {task}: .*{told}"):
        evaluate.plan(spec, SILENT, count=True)


def test_rows_are_chosen_and_added(base, other, instructions, tmp_path, capsys):
    words = ["eval", "--run", tmp_path, "--model", base, "--tasks", "perplexity", "--limit", 4]
    words += ["--task-data", f"perplexity={instructions}", "--json"]
    words = [str(word) for word in words]
    assert run_command([*words, "--row", f"mine={other}"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["rows"]
    assert list(rows) == ["base", "mine"]
    assert run_command([*words, "--rows", "pruned"]) == 2
    assert "unknown row 'pruned'" in capsys.readouterr().err
    assert run_command([*words, "--row", f"mine={instructions}"]) == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(base, tmp_path):
    """SIGKILL in the middle of a row; what was answered is in the file and is not asked again."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i} plus {i}?", "answer": f"#### {2 * i}"} for i in range(80)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "--run", tmp_path / "run", "--model", base, "--tasks", "lm_eval:gsm8k"]
    words += ["--task-data", f"lm_eval:gsm8k={data}", "--num-fewshot", 0, "--batch-size", 2]
    words += ["--max-new-tokens", 60, "--json"]
    command = [sys.executable, "-m", "loram_cli", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    run = tmp_path / "run"

    def answered(kept=run / ".eval.partial" / "responses"):
        lines = [
            line for file in kept.glob("*.jsonl") for line in file.read_bytes().splitlines(True)
        ]
        return sum(len(json.loads(line)) for line in lines if line.endswith(b"\n"))

    deadline = time.monotonic() + 240
    while answered() < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answered()
    assert 6 <= before < 80
    assert not (tmp_path / "run" / "eval").exists()
    assert run_command([*map(str, words)]) == 0
    assert answered(run / "eval" / "responses") == 80
    assert {path.name for path in run.iterdir()} == {"eval"}
