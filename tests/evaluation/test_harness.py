import json
import socket
from contextlib import contextmanager

import pytest
import torch

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation import requests
from loram_cli.evaluation.engine import Engine
from loram_cli.evaluation.harness import evaluate_model
from loram_cli.evaluation.requests import TaskRequest, resolve_tasks
from loram_cli.quiet import quiet_lm_eval
from loram_cli.reporting import NullReporter
from loram_cli.training.data.documents import Example, load_instructions
from loram_cli.training.data.records import read_records


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("evaluation touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Recorder(NullReporter):
    def __init__(self):
        self.warnings, self.bars = [], {}

    def warn(self, line):
        self.warnings.append(line)

    @contextmanager
    def progress(self, label, total, unit="it"):
        bars, key = self.bars, (label, total, unit)

        class Bar:
            def advance(self, steps=1):
                bars[key] = bars.get(key, 0) + steps

            skip = advance

            def detail(self, text):
                pass

        yield Bar()


def bundled(*names, **options):
    return resolve_tasks(names, {}, prefer_bundled=True, **options)


def read(path):
    return [dict(record.fields) for record in read_records(str(path))]


class Scripted:
    """A backend that says ``answers``, by prompt."""

    def __init__(self, answers):
        self.answers = answers

    def generate(self, jobs):
        yield [(place, self.answers[job.prompt]) for place, job in enumerate(jobs)]


@pytest.fixture
def evaluate(engine_of):
    def run(model, tokenizer, tasks, batch_size=8, **options):
        return evaluate_model(engine_of(model, tokenizer, batch_size), tasks, **options)

    return run


@pytest.fixture
def answer_with(tokenizer):
    def run(answers, tasks, **options):
        engine = Engine(lambda: Scripted(answers), tokenizer, 1024)
        return evaluate_model(engine, tasks, **options)

    return run


def test_bundled_tasks_run_offline_silently_and_report_progress(
    evaluate, model, tokenizer, capfd, tmp_path
):
    recorder, samples = Recorder(), tmp_path / "samples.jsonl"
    scores = evaluate(
        model,
        tokenizer,
        bundled("gsm8k", "humaneval", "perplexity", limit=4),
        batch_size=4,
        allow_code_execution=True,
        max_new_tokens=16,
        reporter=recorder,
        samples_path=samples,
    )
    assert capfd.readouterr() == ("", "")
    assert tokenizer.pad_token is None
    assert [(s.task, s.metric) for s in scores] == [
        ("gsm8k", "exact_match,strict-match"),
        ("gsm8k", "exact_match,flexible-extract"),
        ("humaneval", "pass@1"),
        ("perplexity", "perplexity"),
    ]
    assert all(s.bundled and s.samples == 4 and s.skipped is None for s in scores)
    assert [s.higher_is_better for s in scores] == [True, True, True, False]
    assert recorder.bars == {
        ("gsm8k", 4, "text"): 4,
        ("humaneval", 4, "text"): 4,
        ("sandbox", 4, "program"): 4,
        ("perplexity", 4, "record"): 4,
    }
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {(row["task"], row.get("filter")) for row in rows} == {
        ("gsm8k", "strict-match"),
        ("gsm8k", "flexible-extract"),
        ("humaneval", None),
    }
    assert {"prompt", "output", "target", "correct"} <= rows[0].keys()


def test_right_answers_score_one_and_wrong_ones_zero(answer_with):
    problems = read(bundled("gsm8k")[0].data_file)
    right = {f"Question: {p['question']}\nAnswer:": " " + p["answer"] for p in problems}
    strict, flexible = answer_with(right, bundled("gsm8k"))
    assert (strict.value, flexible.value, strict.samples) == (1.0, 1.0, 24)
    # Without the #### mark only the flexible filter finds the number; every other one is wrong.
    half = {
        prompt: f" it is {answer.split('#### ')[1] if index % 2 else 'nothing'}"
        for index, (prompt, answer) in enumerate(right.items())
    }
    strict, flexible = answer_with(half, bundled("gsm8k"))
    assert (strict.value, flexible.value) == (0.0, 0.5)
    assert flexible.stderr == pytest.approx((0.25 * 24 / 23 / 24) ** 0.5)


def test_humaneval_scores_what_the_sandbox_says(answer_with):
    problems = read(bundled("humaneval")[0].data_file)
    solutions = {p["prompt"]: p["canonical_solution"] for p in problems}
    solutions |= {p["prompt"]: "    return None\n" for p in problems[:3]}
    (score,) = answer_with(solutions, bundled("humaneval"), allow_code_execution=True)
    assert score.value == 9 / 12
    assert score.stderr == pytest.approx((0.75 * 0.25 / 11) ** 0.5)
    assert "network: " in score.detail


def test_without_permission_humaneval_is_skipped_and_the_rest_runs(
    evaluate, model, tokenizer, monkeypatch
):
    from loram_cli.evaluation import code_tasks

    monkeypatch.setattr(code_tasks, "check_completions", lambda *_, **__: pytest.fail("ran code"))
    skipped, perplexity = evaluate(model, tokenizer, bundled("humaneval", "perplexity"))
    assert (skipped.task, skipped.value) == ("humaneval", None)
    assert skipped.skipped.startswith("needs --allow-code-execution")
    assert perplexity.value > 1


@pytest.mark.parametrize("num_fewshot", [None, 0, 3])
def test_gsm8k_prompts_are_lm_evals_own(shared_file, monkeypatch, tmp_path, num_fewshot):
    """Against lm-eval's task loaded its own way: Hugging Face's JSON loader on the same files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from loram_cli.evaluation import lmeval

    test_file, train_file = (
        shared_file("data/gsm8k_test.jsonl"),
        shared_file("data/gsm8k_train.jsonl"),
    )
    request = TaskRequest("gsm8k", test_file, train_file=train_file, num_fewshot=num_fewshot)
    with quiet_lm_eval():
        ours = lmeval.build_tasks(request, None, 1024, seed=1234)["tasks"]["gsm8k"]
        config = load_yaml(lmeval._TASKS_DIR / "gsm8k" / "gsm8k.yaml", resolve_func=True)
        files = {"test": str(test_file), "train": str(train_file)}
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        config["dataset_kwargs"]["cache_dir"] = str(tmp_path)
        config.pop("dataset_name")
        manager = TaskManager(include_defaults=False)
        theirs = manager.load([config])["tasks"]["gsm8k"]
        theirs.set_config("num_fewshot", 5 if num_fewshot is None else num_fewshot)
        theirs.set_fewshot_seed(1234)
        prompts = []
        for task in (ours, theirs):
            task.build_all_requests(limit=200, rank=0, world_size=1)
            prompts.append([instance.args for instance in task.instances])
    assert len(prompts[0]) == 200
    assert [text for text, _ in prompts[0]] == [text for text, _ in prompts[1]]
    assert prompts[0][0][0].count("Question:") == 1 + (5 if num_fewshot is None else num_fewshot)
    stops = [{k: v for k, v in kwargs.items() if k != "max_gen_toks"} for _, kwargs in prompts[0]]
    assert stops == [kwargs for _, kwargs in prompts[1]]


def test_humaneval_prompts_are_the_documents_own(shared_file):
    from loram_cli.evaluation import lmeval

    path = shared_file("data/HumanEval.jsonl.gz")
    with quiet_lm_eval():
        task = lmeval.build_tasks(TaskRequest("humaneval", path, num_fewshot=5), None, 4096, 0)
        task = task["tasks"]["humaneval"]
        task.build_all_requests(rank=0, world_size=1)
    expected = [record["prompt"] for record in read(path)]
    assert [instance.args[0] for instance in task.instances] == expected
    assert len(expected) == 164
    # The stock file cannot be loaded offline, but it can be read.
    stock = (lmeval._TASKS_DIR / "humaneval" / "humaneval.yaml").read_text()
    for stop in task.config.generation_kwargs["until"]:
        assert f"- {json.dumps(stop)}" in stock
    assert 'doc_to_text: "{{prompt}}"' in stock


def test_examples_from_the_same_file_leave_the_asked_one_out(
    evaluate, model, tokenizer, write_jsonl
):
    from loram_cli.evaluation import lmeval

    records = [{"question": f"q{i}?", "answer": f"a{i}\n#### {i}"} for i in range(4)]
    path = write_jsonl("few.jsonl", records)
    with quiet_lm_eval():
        task = lmeval.build_tasks(TaskRequest("gsm8k", path, num_fewshot=3), None, 1024, 1)
        task = task["tasks"]["gsm8k"]
        task.build_all_requests(rank=0, world_size=1)
    for record, instance in zip(records, task.instances, strict=True):
        assert instance.args[0].endswith(f"Question: {record['question']}\nAnswer:")
        assert sorted(instance.args[0].count(r["question"]) for r in records) == [1] * 4
        assert record["answer"] not in instance.args[0]
    with pytest.raises(UsageError, match="expected 5 few-shot examples, found 3"):
        evaluate(model, tokenizer, [TaskRequest("gsm8k", path)])


def test_batching_and_padding_change_no_output(evaluate, stories, tmp_path):
    model, tokenizer = stories
    outputs = []
    for batch_size in (1, 5, 64):
        path = tmp_path / f"{batch_size}.jsonl"
        evaluate(
            model,
            tokenizer,
            bundled("gsm8k", limit=10),
            batch_size=batch_size,
            max_new_tokens=24,
            samples_path=path,
        )
        outputs.append([json.loads(line)["output"] for line in path.read_text().splitlines()])
    assert len(set(outputs[0])) > 1
    assert outputs[0] == outputs[1] == outputs[2]


def test_generation_stops_early(evaluate, model, tokenizer, monkeypatch):
    """A model that can only say the end token takes a step, not the whole allowance."""
    steps = []
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        steps.append(1)
        out = forward(self, *args, **kwargs)
        out.logits[..., 1] = 1e4
        return out

    monkeypatch.setattr(type(model), "forward", counted)
    evaluate(model, tokenizer, bundled("gsm8k", limit=8), batch_size=8)
    assert len(steps) <= 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_model_is_scored_as_such(evaluate, model, tokenizer):
    from peft import LoraConfig, get_peft_model

    tasks = bundled("gsm8k", "perplexity", limit=3)
    before = evaluate(model, tokenizer, tasks, batch_size=3, max_new_tokens=8)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    untouched = evaluate(adapted, tokenizer, tasks, batch_size=3, max_new_tokens=8)
    assert [s.value for s in untouched] == [s.value for s in before]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed = evaluate(adapted, tokenizer, tasks, batch_size=3, max_new_tokens=8)
    assert changed[-1].value != before[-1].value


def test_model_with_uneven_layers_runs(evaluate, tiny_config, tokenizer):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    narrow = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20}
    config = transformers.LlamaConfig(
        **tiny_config,
        per_layer_config={1: narrow},
        allow_global_per_layer_attribute_access=True,
    )
    uneven = transformers.LlamaForCausalLM(config)
    uneven.model.layers[1] = LlamaDecoderLayer(config.per_layer_config[1], 1)
    assert uneven.model.layers[1].mlp.up_proj.weight.shape == (20, 32)
    scores = evaluate(
        uneven.eval(), tokenizer, bundled("gsm8k", "perplexity", limit=3), max_new_tokens=8
    )
    assert [s.samples for s in scores] == [3, 3, 3]


def test_prompts_beyond_the_context_are_cut_with_a_warning(evaluate, model, tokenizer, write_jsonl):
    path = write_jsonl("long.jsonl", [{"question": "x" * 2000, "answer": "#### 1"}])
    recorder = Recorder()
    request = TaskRequest("gsm8k", path, num_fewshot=0)
    evaluate(model, tokenizer, [request], max_new_tokens=4, reporter=recorder)
    assert recorder.warnings == [
        "gsm8k: 1 of 1 prompts exceed 1020 tokens and lost their start "
        "(ask for fewer few-shot examples)"
    ]


def test_other_tasks_run_on_local_documents(evaluate, model, tokenizer, write_jsonl):
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    records = [
        {"id": str(i), "question": f"Which {i}?", "choices": choices, "answerKey": "AB"[i % 2]}
        for i in range(4)
    ]
    path = write_jsonl("arc.jsonl", records)
    request = TaskRequest("arc_easy", path, num_fewshot=1)
    scores = evaluate(model, tokenizer, [request], batch_size=4)
    assert [s.metric for s in scores] == ["acc", "acc_norm"]
    assert all(s.samples == 4 and s.num_fewshot == 1 and 0 <= s.value <= 1 for s in scores)
    wrong = TaskRequest("arc_easy", write_jsonl("wrong.jsonl", [{**records[0], "answerKey": "Z"}]))
    with pytest.raises(LoramError, match="does not have the layout of task 'arc_easy'"):
        evaluate(model, tokenizer, [wrong])


def test_missing_data_names_the_flag(evaluate, model, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(requests, "hub_reachable", lambda: False)
    from loram_cli.evaluation import lmeval

    monkeypatch.setattr(lmeval, "hub_reachable", lambda: False)
    with pytest.raises(LoramError, match="--task-data arc_easy=FILE"):
        evaluate(model, tokenizer, [TaskRequest("arc_easy")])
    with pytest.raises(LoramError, match="--task-data perplexity=FILE"):
        evaluate(model, tokenizer, [TaskRequest("perplexity")])


@pytest.mark.slow  # lm-eval indexes its 14000 task files
def test_unknown_task_is_refused_with_a_suggestion(evaluate, model, tokenizer):
    with pytest.raises(UsageError, match="did you mean 'gsm8k'"):
        evaluate(model, tokenizer, [TaskRequest("gsm8kk")])


def test_perplexity_takes_texts_and_every_layout_of_training(
    evaluate, model, tokenizer, write_jsonl, tmp_path
):
    def score(**fields):
        (found,) = evaluate(model, tokenizer, [TaskRequest("perplexity", **fields)])
        return found

    examples = (Example("Question: a?\nAnswer:", " b"), Example("Question: c?\nAnswer:", " dd"))
    expected = score(examples=examples)
    assert (expected.samples, expected.detail) == (2, "7 answer tokens")
    assert expected.ci_low < expected.value < expected.ci_high
    records = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "dd"}]
    assert score(data_file=write_jsonl("q.jsonl", records)).value == expected.value
    records = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    assert score(data_file=write_jsonl("p.jsonl", records)).value == expected.value
    # Alpaca's template, as training has it: the very same loader.
    alpaca = write_jsonl("a.jsonl", [{"instruction": "c?", "output": "dd"}] * 2)
    rendered = tuple(load_instructions(str(alpaca)))
    assert "### Instruction:" in rendered[0].prompt
    assert score(data_file=alpaca).value == score(examples=rendered).value
    text = tmp_path / "a.txt"
    text.write_text("some text")
    assert score(data_file=text).detail == "9 tokens"
    listed = write_jsonl("t.jsonl", [{"text": "some text"}])
    assert score(data_file=listed).value == score(data_file=text).value
    with pytest.raises(LoramError, match=r"perplexity: .*x\.jsonl, line 1: no known layout"):
        score(data_file=write_jsonl("x.jsonl", [{"title": "?"}]))
