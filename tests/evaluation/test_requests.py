import pytest

from loram_cli.errors import UsageError
from loram_cli.evaluation import requests
from loram_cli.evaluation.catalog import CSR
from loram_cli.evaluation.requests import TaskRequest, resolve_tasks

PROBLEM = {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}


def test_the_papers_tasks_are_asked_as_in_the_paper(write_jsonl):
    path = write_jsonl("mine.jsonl", [PROBLEM])
    names = ["gsm8k", "lm_eval:gsm8k", "mathqa", "csr"]
    data = {"gsm8k": path, "lm_eval:gsm8k": path, "piqa": path, "piqa:train": path}
    found = resolve_tasks(names, data, prefer_bundled=True, limit=3)
    asked = [(r.name, r.lm_eval_name, r.num_fewshot, r.variant) for r in found]
    assert asked[:3] == [
        ("gsm8k", "gsm8k_cot", 8, "CoT"),
        ("lm_eval:gsm8k", "gsm8k", None, ""),
        ("mathqa", "mathqa", 1, ""),
    ]
    assert [(r.name, r.num_fewshot, r.group) for r in found[3:]] == [(t, 1, "csr") for t in CSR]
    piqa = next(r for r in found if r.name == "piqa")
    assert (piqa.data_file, piqa.train_file, piqa.bundled, piqa.limit) == (path, path, False, 3)
    assert all(
        r.num_fewshot == 2 for r in resolve_tasks(names, data, prefer_bundled=True, num_fewshot=2)
    )


@pytest.mark.parametrize(("reachable", "bundled"), [(True, False), (False, True)])
def test_bundled_sample_stands_in_for_a_hub_out_of_reach(monkeypatch, tmp_path, reachable, bundled):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "hub_reachable", lambda: reachable)
    (request,) = resolve_tasks(["gsm8k"], {}, prefer_bundled=False)
    assert (request.bundled, request.data_file is not None) == (bundled, bundled)
    assert request.lm_eval_name == ("gsm8k" if bundled else "gsm8k_cot")
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
        (["csr"], {"csr": "here"}, "'csr' is a group"),
        (["gsm8k"], {"gsm8k": "here", "gsm8k:train": "here"}, "lm_eval:gsm8k"),
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
