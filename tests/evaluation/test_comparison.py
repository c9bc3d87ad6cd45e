import io
from dataclasses import replace

import pytest

from loram_cli.cli.draw.scores import WIDTH, score_tables
from loram_cli.evaluation.comparison import (
    gain_retention,
    remarks,
    score_columns,
    score_text,
    title,
)
from loram_cli.evaluation.requests import TaskScore
from loram_cli.evaluation.results import EvalResult, RowResult, TrainingCost


def score(task, value, metric="acc", **changes):
    fields = {
        "task": task, "metric": metric, "value": value, "stderr": 0.01, "samples": 100,
        "bundled": False, "skipped": None, "higher_is_better": True, "num_fewshot": 1,
        "detail": "", "variant": "", "group": "",
        "ci_low": None if value is None else value - 0.02,
        "ci_high": None if value is None else value + 0.03,
    }  # fmt: skip
    return TaskScore(**{**fields, **changes})


def results(rows, bundled=False, training=None):
    cost = TrainingCost(
        trained_on_params=6005662720, peak_memory_increase_bytes=29 * 2**30, wall_seconds=3700.0
    )
    made = {
        label: RowResult(scores=tuple(scores), training=cost if label == training else None)
        for label, scores in rows.items()
    }
    return EvalResult(bundled=bundled, rows=made)


def test_cells_hold_the_wider_half_of_the_interval():
    assert score_text(score("a", 0.512)) == "51.2 ±3.0"
    perplexity = score("p", 2.345, higher_is_better=False, ci_low=2.3, ci_high=2.4)
    assert score_text(perplexity) == "2.345 ±0.055"
    assert score_text(score("a", 0.5, ci_low=None)) == "50.0"
    assert score_text(score("a", None)) == score_text(None) == "not run"


def test_headers_say_how_it_was_asked():
    cot = score("gsm8k", 0.5, "exact_match,strict-match", num_fewshot=8, variant="CoT")
    (column,) = score_columns(results({"base": [cot]}))
    assert column.header == ("gsm8k", "CoT 8-shot", "strict")


def test_wide_comparisons_are_cut_into_tables_of_a_hundred_columns():
    from rich.console import Console

    tasks = [score(f"task_number_{i}", 0.5) for i in range(12)]
    rows = dict.fromkeys(("base", "pruned", "recovered", "merged", "full-lora"), tasks)
    tables = score_tables(results(rows, training="recovered"))
    assert len(tables) > 1
    console = Console(width=300, file=io.StringIO())
    for table in tables:
        console.print(table)
    text = console.file.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= WIDTH
    assert text.count("recovered") == len(tables)
    assert all(f"task_number_{i} " in text for i in range(12))


def test_samples_are_never_titled_as_the_benchmark():
    assert "not the published benchmark" in title(results({"base": []}, bundled=True))
    assert "not the published" not in title(results({"base": []}))


def test_weights_in_4_bits_are_in_the_title():
    quantized = replace(results({"base": []}, bundled=True), quantize="nf4")
    assert title(quantized).startswith("held-out results, weights in NF4 (bundled")
    assert "NF4" not in title(replace(quantized, quantize=None))


def test_what_did_not_run_is_told_once():
    skipped = score("humaneval", None, "pass@1", skipped="needs a flag")
    lines = remarks(results({"base": [skipped, skipped], "pruned": [skipped]}))
    assert lines == ["humaneval: not run, needs a flag"]


def test_gain_is_related_to_full_loras_where_there_is_one():
    def rows(full):
        return {
            "base": [score("gsm8k", 0.7528, ci_low=0.75, ci_high=0.76)],
            "recovered": [score("gsm8k", 0.8036)],
            "full-lora": [score("gsm8k", full, ci_low=full - 0.01, ci_high=full + 0.01)],
        }

    # Table 7 of the paper: 75.28, 80.36 and 80.74.
    assert gain_retention(results(rows(0.8074)))["gsm8k"] == pytest.approx(0.93, abs=0.005)
    assert gain_retention(results(rows(0.765))) == {}
    assert gain_retention(results({"base": []})) == {}


def test_a_polished_row_is_held_against_full_lora_as_well():
    shares = {"base": 0.3, "recovered": 0.7, "polished": 0.8, "full-lora": 0.8}
    found = results({name: [score("gsm8k", value)] for name, value in shares.items()})
    lines = [line for line in remarks(found) if "full LoRA's gain" in line]
    assert lines == [
        "kept of full LoRA's gain over the base: gsm8k 80%",
        "kept of full LoRA's gain over the base (polished): gsm8k 100%",
    ]
