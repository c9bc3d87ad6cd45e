import gzip
from pathlib import Path

import pytest

from loram_cli.errors import LoramError
from loram_cli.evaluation.documents import task_documents

PROBLEM = {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}


def test_all_file_kinds_give_the_same_records(write_jsonl, tmp_path):
    plain = write_jsonl("a.jsonl", [PROBLEM, PROBLEM])
    packed = write_jsonl("a.jsonl.gz", [PROBLEM, PROBLEM])
    listed = tmp_path / "a.json"
    listed.write_text("[\n" + ",\n".join(plain.read_text().splitlines()) + "\n]")
    for path in (plain, packed, listed):
        assert task_documents(str(path), "gsm8k_cot", "gsm8k") == [PROBLEM, PROBLEM]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no record"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n\n{"question":\n', "line 3: broken JSON"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"}\n', "line 2: .*'answer'"),
        ("a.jsonl", b"[1]\n", "record 1: expected an object"),
        ("a.json", b'[\n{"question": }]', "line 2: broken JSON"),
        ("a.jsonl", b"\xff\xfe", "line 1: not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        # mtime: the bytes are part of the test's name, which must not change by the second.
        ("a.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:20], "cannot be read"),
        ("a.dat", b"x", "unknown kind"),
    ],
)
def test_bad_files_are_named_with_flag_and_line(tmp_path: Path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LoramError, match=message) as caught:
        task_documents(str(path), "gsm8k_cot", "gsm8k")
    assert str(path) in str(caught.value)
    assert "--task-data gsm8k" in str(caught.value)


def test_original_layouts_become_the_hubs(write_jsonl):
    stem = {
        "id": "7",
        "question": {
            "stem": "Which?",
            "choices": [{"text": "red", "label": "A"}, {"text": "blue", "label": "B"}],
        },
        "answerKey": "B",
    }
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    path = str(write_jsonl("arc.jsonl", [stem]))
    (arc,) = task_documents(path, "arc_easy", "arc_easy")
    assert (arc["question"], arc["choices"], arc["answerKey"]) == ("Which?", choices, "B")
    (book,) = task_documents(path, "openbookqa", "openbookqa")
    assert (book["question_stem"], book["choices"]) == ("Which?", choices)

    for odd in (3, [3], "red"):
        path = str(write_jsonl("arc.jsonl", [{**stem, "question": {"stem": "?", "choices": odd}}]))
        with pytest.raises(LoramError, match="is not in the layout of arc_easy"):
            task_documents(path, "arc_easy", "arc_easy")

    piqa = write_jsonl("valid.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2)
    with pytest.raises(LoramError, match="'label' of piqa is missing"):
        task_documents(str(piqa), "piqa", "piqa")
    piqa.with_name("valid-labels.lst").write_text("1\n0\n")
    assert [d["label"] for d in task_documents(str(piqa), "piqa", "piqa")] == [1, 0]
    piqa.with_name("valid-labels.lst").write_text("1\n")
    with pytest.raises(LoramError, match="1 labels for 2 documents"):
        task_documents(str(piqa), "piqa", "piqa")
    piqa.with_name("valid-labels.lst").write_bytes(b"\xff")
    with pytest.raises(LoramError, match="not UTF-8"):
        task_documents(str(piqa), "piqa", "piqa")

    swag = {"activity_label": "A", "ctx_a": "x", "ctx_b": "y", "endings": ["e"] * 4, "label": 2}
    (found,) = task_documents(str(write_jsonl("h.jsonl", [swag])), "hellaswag", "hellaswag")
    assert found["label"] == "2"
