import json
import shutil
from pathlib import Path

import pytest
from helpers.browser import measured, picture
from PIL import Image

from loram_cli.runs.manifest import Manifest
from loram_cli.tools.html_page import render_page, write_page
from loram_cli.tools.page_parts import answers, data_lengths

LONG = "word " * 400


def samples(folder: Path, outputs: dict[str, list[tuple[str, bool]]]) -> Path:
    """An evaluation's saved answers: per row, text and verdict of each document."""
    folder.mkdir(exist_ok=True)
    for label, found in outputs.items():
        lines = [
            json.dumps(
                {
                    "task": "gsm8k", "doc_id": i, "prompt": f"Example.\n\nQuestion {i} <b>?",
                    "target": f"#### {i}", "output": text, "correct": right,
                }
            )
            for i, (text, right) in enumerate(found)
        ]  # fmt: skip
        (folder / f"samples-{label}.jsonl").write_text("\n".join(lines))
    return folder


def test_answers_stand_beside_each_other_those_first_that_differ(tmp_path):
    folder = samples(
        tmp_path / "eval",
        {
            "base": [("same", True), ("<i>one", False), ("x", False)],
            "recovered": [("same", True), ("two", True), ("y", False)],
        },
    )
    page = "".join(answers(folder))
    assert page.index("gsm8k 1:") < page.index("gsm8k 0:") < page.index("gsm8k 2:")
    assert "3 of 3 documents, those first where rows differ (1)" in page
    assert "Question 1 &lt;b&gt;?" in page and "Example" not in page
    assert "&lt;i&gt;one" in page and "<i>" not in page
    assert page.count('<section class="right">') == 3
    assert page.count('<section class="wrong">') == 3


def test_long_answers_and_many_documents_are_cut(tmp_path):
    folder = samples(tmp_path / "eval", {"base": [(LONG, True)] * 40})
    page = "".join(answers(folder))
    assert "12 of 40 documents" in page
    assert page.count("<section") == 12
    assert page.count("<details open>") == 3
    assert len(page) < 12 * 1800


def test_an_evaluation_without_texts_shows_none(tmp_path, finished_run):
    assert list(answers(finished_run / "eval")) == []
    assert list(answers(tmp_path)) == []


def test_the_page_counts_the_data_and_the_memory(finished_run):
    page = render_page(finished_run)
    assert "60 examples, median" in page
    assert page.count("</i>") > 3
    # The base and the pruned model, neither in NF4: the training was not.
    assert "<span>base LoRA</span>" in page
    assert "<span>pruned LoRAM</span>" in page
    assert "QLoRA" not in page


def test_data_that_changed_or_is_gone_gives_no_histogram(finished_run, tmp_path):
    manifest = Manifest.read(finished_run / "adapter")
    data = tmp_path / "data.jsonl"
    shutil.copyfile(manifest.spec["data"], data)
    spec = {**manifest.spec, "data": str(data)}
    object.__setattr__(manifest, "spec", spec)
    assert 'class="histogram"' in "".join(data_lengths(manifest, finished_run / "pruned"))
    with data.open("a") as file:
        file.write('{"question": "a", "answer": "b"}\n')
    assert "has changed since" in "".join(data_lengths(manifest, finished_run / "pruned"))
    data.unlink()
    page = "".join(data_lengths(manifest, finished_run / "pruned"))
    assert "No histogram: " in page and str(data) in page


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(390, 844), (360, 640), (1280, 800)])
def test_a_browser_shows_all_of_it_without_scrolling_sideways(run_copy, tmp_path, width, height):
    samples(
        run_copy / "eval",
        {
            label: [(LONG, True), ("a" * 900, False), ("short", label == "base")]
            for label in ("base", "pruned", "recovered", "merged")
        },
    )
    page = tmp_path / "page.html"
    write_page(run_copy, page)
    found = measured(page, tmp_path, width, height)
    assert found["width"] <= width
    assert found["out"] == []
    assert found["empty"] == 0
    for heading in ("Answers side by side", "Loss curves", "Memory of training", "Training data"):
        assert heading in found["headings"]
    shot = Image.open(picture(page, tmp_path, width, min(found["height"], 6000)))
    # Ink in every third of the page, from top to bottom: nothing is a blank field.
    grey = shot.convert("L").crop((0, 0, width, shot.height))
    thirds = [grey.crop((0, top, width, top + grey.height // 3))
              for top in range(0, grey.height - 2, grey.height // 3)][:3]  # fmt: skip
    assert all(third.getextrema()[0] < 100 for third in thirds)
