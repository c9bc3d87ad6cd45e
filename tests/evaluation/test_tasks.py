"""Every task's prompts against lm-eval's own for the same documents, offline."""

import json

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation import requests
from loram_cli.evaluation.catalog import CSR
from loram_cli.evaluation.harness import evaluate_model
from loram_cli.evaluation.requests import TaskRequest, resolve_tasks
from loram_cli.quiet import quiet_lm_eval
from loram_cli.reporting import NullReporter


class Told(NullReporter):
    """Keeps the warnings."""

    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


def documents(task, count):
    """Own-written documents in the layout of the hub's copy."""
    letters = {"text": ["a red one", "a blue one"], "label": ["A", "B"]}
    options = "a ) 10 , b ) 20 , c ) 30 , d ) 40 , e ) 50"
    make = {
        "gsm8k": lambda i: {"question": f"{i} plus 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"},
        "mathqa": lambda i: {
            "Problem": f"what is {10 * (i + 1)} ?",
            "Rationale": "see",
            "options": options,
            "correct": "abcde"[i % 5],
            "annotated_formula": "",
            "linear_formula": "",
            "category": "general",
        },
        "arc_easy": lambda i: {
            "id": str(i),
            "question": f"Which {i}?",
            "choices": letters,
            "answerKey": "AB"[i % 2],
        },
        "openbookqa": lambda i: {
            "id": str(i),
            "question_stem": f"The {i}th is",
            "choices": letters,
            "answerKey": "AB"[i % 2],
        },
        "piqa": lambda i: {"goal": f"Do {i}", "sol1": "push", "sol2": "pull", "label": i % 2},
        "hellaswag": lambda i: {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": f"Cook {i} stirs.",
            "ctx_b": "then she",
            "ctx": "",
            "endings": ["sits [title] down.", "eats.", "runs  off.", "sleeps."],
            "label": str(i % 4),
        },
        "winogrande": lambda i: {
            "sentence": f"Ann asked Bo {i} times since _ was late.",
            "option1": "Ann",
            "option2": "Bo",
            "answer": "12"[i % 2],
        },
    }
    make["arc_challenge"] = make["arc_easy"]
    return [make[task](i) for i in range(count)]


def prompts_of(task, limit):
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def compare(monkeypatch, tmp_path, request, shots, limit=None):
    """(ours, theirs): theirs loaded lm-eval's own way, by Hugging Face's JSON loader."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from loram_cli.evaluation import lmeval

    name = request.lm_eval_name
    with quiet_lm_eval():
        (ours,) = lmeval.build_tasks(request, None, 4096, seed=1234)["tasks"].values()
        config = load_yaml(lmeval._TASKS_DIR / lmeval._FILES[name], resolve_func=True)
        test = str(request.data_file)
        files = {"train": str(request.train_file or test), "validation": test, "test": test}
        config |= {"dataset_path": "json", "dataset_name": None}
        config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
        theirs = TaskManager(include_defaults=False).load([config])["tasks"][name]
        theirs.set_config("num_fewshot", shots)
        theirs.set_fewshot_seed(1234)
        return prompts_of(ours, limit), prompts_of(theirs, limit)


def without_cap(arguments):
    context, second = arguments
    if isinstance(second, dict):
        second = {k: v for k, v in second.items() if k != "max_gen_toks"}
    return context, second


@pytest.mark.parametrize("task", ["mathqa", *CSR])
def test_one_shot_prompts_and_choices_are_lm_evals_own(task, monkeypatch, tmp_path, write_jsonl):
    data = {
        task: write_jsonl("test.jsonl", documents(task, 5)),
        f"{task}:train": write_jsonl("train.jsonl", documents(task, 9)),
    }
    name = "csr" if task in CSR else task
    found = resolve_tasks([name], data, prefer_bundled=True)
    request = next(r for r in found if r.name == task)
    ours, theirs = compare(monkeypatch, tmp_path, request, 1)
    assert ours == theirs
    choices = {"mathqa": 5, "hellaswag": 4}.get(task, 2)
    assert len(ours) == 5 * choices
    assert len({context for context, _ in ours}) >= 5


def test_gsm8k_has_the_eight_published_examples(monkeypatch, tmp_path, write_jsonl):
    data = {"gsm8k": write_jsonl("test.jsonl", documents("gsm8k", 3))}
    (request,) = resolve_tasks(["gsm8k"], data, prefer_bundled=True)
    ours, theirs = compare(monkeypatch, tmp_path, request, 8)
    assert list(map(without_cap, ours)) == list(map(without_cap, theirs))
    prompt, arguments = ours[0]
    assert prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.count("\n\nQ: ") == 8
    assert prompt.endswith("Q: 0 plus 1?\nA:")
    assert arguments["until"] == ["Q:", "</s>", "<|im_end|>"]


@pytest.mark.parametrize("limit", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_published_gsm8k_is_asked_as_lm_eval_asks(
    shared_file, monkeypatch, tmp_path, tokenizer, limit
):
    data = {"gsm8k": shared_file("data/gsm8k_test.jsonl")}
    (request,) = resolve_tasks(["gsm8k"], data, prefer_bundled=True)
    ours, theirs = compare(monkeypatch, tmp_path, request, 8, limit)
    assert len(ours) == (limit or 1319)
    assert list(map(without_cap, ours)) == list(map(without_cap, theirs))
    ids = [tokenizer([prompt for prompt, _ in side[:3]])["input_ids"] for side in (ours, theirs)]
    assert ids[0] == ids[1]


def test_more_examples_than_published_are_refused(engine_of, model, tokenizer, write_jsonl):
    data = {"gsm8k": write_jsonl("test.jsonl", documents("gsm8k", 3))}
    asked = resolve_tasks(["gsm8k"], data, prefer_bundled=True, num_fewshot=9)
    with pytest.raises(UsageError, match="expected 9 few-shot examples, found 8"):
        evaluate_model(engine_of(model, tokenizer), asked)


def test_csr_is_the_mean_of_six_tasks_with_its_spread(model, tokenizer, engine_of, write_jsonl):
    data = {task: write_jsonl(f"{task}.jsonl", documents(task, 4)) for task in CSR}
    asked = resolve_tasks(["csr"], data, prefer_bundled=True)
    mean, *rest = evaluate_model(engine_of(model, tokenizer), asked)
    assert (mean.task, mean.metric, mean.samples) == ("csr", "mean acc", 24)
    accuracies = [s for s in rest if s.metric == "acc"]
    assert [s.task for s in accuracies] == list(CSR)
    assert all(
        s.num_fewshot == 1 and s.ci_low < s.value + 1e-9 < s.ci_high + 2e-9 for s in accuracies
    )
    values = [s.value for s in accuracies]
    assert mean.value == pytest.approx(sum(values) / 6)
    spread = (sum((v - mean.value) ** 2 for v in values) / 5) ** 0.5
    assert mean.detail == f"mean of acc over 6 tasks, std over tasks {100 * spread:.2f}"
    errors = sum(s.stderr**2 for s in accuracies) ** 0.5 / 6
    assert mean.stderr == pytest.approx(errors)


def test_a_choice_is_saved_as_its_text(model, tokenizer, engine_of, write_jsonl, tmp_path):
    data = {t: write_jsonl(f"{t}.jsonl", documents(t, 4)) for t in ("arc_easy", "winogrande")}
    asked = resolve_tasks(list(data), data, prefer_bundled=True, num_fewshot=0)
    saved = tmp_path / "samples.jsonl"
    scores = evaluate_model(engine_of(model, tokenizer), asked, samples_path=saved)
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    arc = [row for row in rows if row["task"] == "arc_easy"]
    assert {row["output"] for row in arc} <= {"a red one", "a blue one"}
    assert [row["target"] for row in arc] == ["a red one", "a blue one"] * 2
    right = sum(row["output"] == row["target"] for row in arc) / 4
    assert right == next(s.value for s in scores if s.task == "arc_easy")


def test_tasks_written_in_python_take_local_documents(
    model, tokenizer, engine_of, write_jsonl, monkeypatch
):
    from loram_cli.evaluation import lmeval

    monkeypatch.setattr(lmeval, "hub_reachable", lambda: pytest.fail("asked the hub"))
    path = write_jsonl("fda.jsonl", [{"text": "Device: pump. Maker:", "value": "Acme"}] * 3)
    (score,) = evaluate_model(
        engine_of(model, tokenizer), [TaskRequest("fda", path)], max_new_tokens=4
    )
    assert (score.task, score.metric, score.samples) == ("fda", "contains", 3)


def test_tasks_that_fetch_their_metric_at_import_can_be_asked(
    model, tokenizer, engine_of, write_jsonl, monkeypatch
):
    """lm-eval's humaneval_64 fetches code_eval as it is imported; here it is refused as unsafe."""
    problem = {"task_id": "x/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}
    request = TaskRequest("humaneval_64", write_jsonl("h.jsonl", [problem]))
    (score,) = evaluate_model(engine_of(model, tokenizer), [request])
    assert "unconfined" in score.skipped


@pytest.mark.parametrize("name", ["mathqa", "csr", "gsm8k_cot_llama"])
def test_offline_without_data_names_the_flag(name, model, tokenizer, engine_of, monkeypatch):
    from loram_cli.evaluation import lmeval

    for module in (requests, lmeval):
        monkeypatch.setattr(module, "hub_reachable", lambda: False)
    asked = resolve_tasks([name], {}, prefer_bundled=False)
    with pytest.raises(LoramError, match=f"--task-data {asked[0].name}=FILE"):
        evaluate_model(engine_of(model, tokenizer), asked)


@pytest.mark.parametrize(
    ("task", "field", "label"), [("piqa", "label", 2), ("hellaswag", "label", "-1")]
)
def test_a_label_that_is_no_choice_is_named_and_not_scored_as_wrong(
    task, field, label, engine_of, model, tokenizer, write_jsonl
):
    records = documents(task, 3)
    records[1][field] = label
    path = write_jsonl("test.jsonl", records)
    with pytest.raises(LoramError, match=rf"test.jsonl, document 2: the label .*{label}.* choices"):
        evaluate_model(engine_of(model, tokenizer), [TaskRequest(task, path, num_fewshot=0)])


def test_choices_beyond_the_context_are_cut_with_a_warning(
    engine_of, model, tokenizer, write_jsonl
):
    records = documents("piqa", 2)
    records[1]["goal"] = "long " * 300
    path = write_jsonl("test.jsonl", records)
    told = Told()
    request = TaskRequest("piqa", path, num_fewshot=0)
    evaluate_model(engine_of(model, tokenizer), [request], reporter=told)
    assert told.warnings == [
        "piqa: 2 of 4 prompts exceed 1025 tokens and lost their start "
        "(ask for fewer few-shot examples)"
    ]


def test_a_metric_that_is_bootstrapped_prints_nothing(
    model, tokenizer, engine_of, write_jsonl, capfd
):
    documents = [{"sentence": f"He ran {i} times.", "label": i % 2} for i in range(6)]
    request = TaskRequest("cola", data_file=write_jsonl("cola.jsonl", documents))
    [score, *_] = evaluate_model(engine_of(model, tokenizer, 4), [request])
    assert score.metric == "mcc" and score.value is not None
    assert tuple(capfd.readouterr()) == ("", "")
