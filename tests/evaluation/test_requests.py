import gzip
from pathlib import Path

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation import requests
from loram_cli.evaluation.requests import TaskRequest, read_records, resolve_tasks

PROBLEM = {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}


def test_given_file_wins_over_bundled_and_hub(write_jsonl):
    path = write_jsonl("mine.jsonl", [PROBLEM])
    (request,) = resolve_tasks(["gsm8k"], {"gsm8k": path}, prefer_bundled=True, limit=3)
    assert request == TaskRequest("gsm8k", path, bundled=False, limit=3)


@pytest.mark.parametrize(("reachable", "bundled"), [(True, False), (False, True)])
def test_bundled_sample_stands_in_for_a_hub_out_of_reach(monkeypatch, tmp_path, reachable, bundled):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "hub_reachable", lambda: reachable)
    (request,) = resolve_tasks(["gsm8k"], {}, prefer_bundled=False)
    assert (request.bundled, request.data_file is not None) == (bundled, bundled)
    (tmp_path / "hub" / "datasets--openai--gsm8k" / "snapshots").mkdir(parents=True)
    (request,) = resolve_tasks(["gsm8k"], {}, prefer_bundled=False)
    assert not request.bundled


def test_other_tasks_go_to_the_hub_and_repeats_count_once():
    found = resolve_tasks(["arc_easy", "perplexity", "arc_easy"], {}, prefer_bundled=True)
    assert [(r.name, r.bundled) for r in found] == [("arc_easy", False), ("perplexity", True)]


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        ([], {}, "no task"),
        (["gsm8k"], {"gms8k": "here"}, "did you mean 'gsm8k'"),
        (["gsm8k"], {"gsm8k": "absent"}, "absent is not a file"),
        (["arc_easy"], {"arc_easy:train": "here"}, "without --task-data arc_easy"),
    ],
)
def test_mistakes_are_named(names, data, message, write_jsonl, tmp_path):
    write_jsonl("here", [PROBLEM])
    with pytest.raises(UsageError, match=message):
        resolve_tasks(names, {k: tmp_path / v for k, v in data.items()}, prefer_bundled=True)


@pytest.mark.parametrize("field", ["num_fewshot", "limit"])
def test_senseless_numbers_are_refused(field):
    with pytest.raises(UsageError, match=field):
        TaskRequest("gsm8k", **{field: -1})


def test_all_file_kinds_give_the_same_records(write_jsonl, tmp_path):
    plain = write_jsonl("a.jsonl", [PROBLEM, PROBLEM])
    packed = write_jsonl("a.jsonl.gz", [PROBLEM, PROBLEM])
    listed = tmp_path / "a.json"
    listed.write_text("[\n" + ",\n".join(plain.read_text().splitlines()) + "\n]")
    for path in (plain, packed, listed):
        assert read_records(path, "gsm8k") == [PROBLEM, PROBLEM]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no record"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n\n{"question":\n', "line 3: not JSON"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"}\n', "line 2: .*'answer'"),
        ("a.jsonl", b"[1]\n", "line 1: a JSON object"),
        ("a.json", b'[\n{"question": }]', "line 2: not JSON"),
        ("a.jsonl", b"\xff\xfe", "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 999)[:20], "cannot be read"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LoramError, match=message) as caught:
        read_records(path, "gsm8k")
    assert str(path) in str(caught.value)
