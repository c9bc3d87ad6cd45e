"""Scores a model on tasks: lm-eval's harness underneath, our perplexity and code sandbox beside."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.evaluation.humaneval import check_completions, pass_at_k
from loram_cli.evaluation.perplexity import answer_perplexity, context_length, text_perplexity
from loram_cli.evaluation.requests import TaskRequest, TaskScore, read_records
from loram_cli.reporting import NullReporter, Reporter

NEEDS_CODE_EXECUTION = "needs --allow-code-execution (runs generated code in a sandbox)"
_UNSAFE = "lm-eval would run its generated code unconfined; of such tasks only humaneval runs here"
# (question, answer) fields of the common layouts, for perplexity on a file.
_PAIR_FIELDS = (("question", "answer"), ("instruction", "output"), ("prompt", "completion"))


def evaluate_model(
    model: Any,
    tokenizer: Any,
    requests: Sequence[TaskRequest],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    allow_code_execution: bool = False,
    seed: int = 1234,
    max_new_tokens: int | None = None,
    reporter: Reporter | None = None,
    samples_path: Path | None = None,
) -> list[TaskScore]:
    """Run all tasks on a model in memory.

    All documents are loaded before the first forward pass, so that a bad file costs no time.
    ``gsm8k`` is lm-eval's own task (prompts, stops, filters, metric) whatever its documents;
    ``humaneval`` has the prompt and stops of lm-eval's and is scored in the sandbox.

    Args:
        model: A causal LM or PeftModel on its device; its training flag is given back.
        tokenizer: Its tokenizer; a missing pad token is no obstacle, and it is not changed.
        requests: Tasks, see :func:`.requests.resolve_tasks`.
        batch_size: Rows per forward pass.
        limit: First documents of every task that has no limit of its own.
        allow_code_execution: Run generated code; without it ``humaneval`` is skipped.
        seed: Of the few-shot draw, and of sampling where a task samples.
        max_new_tokens: Cap for generated tokens; None keeps each task's (gsm8k 256, humaneval
            1024); never more than half the model's context.
        reporter: Receives progress and warnings.
        samples_path: Write every document's prompt, output, target and correctness (JSON lines).

    Returns:
        One score per task and metric, each task's headline metric first.

    Raises:
        UsageError: Unknown task or too few few-shot examples.
        LoramError: Documents that cannot be had or read; names the flag.
    """
    reporter = reporter or NullReporter()
    runs = [
        _prepare(request, model, allow_code_execution, seed=seed, limit=limit, cap=max_new_tokens)
        for request in requests
    ]
    was_training = model.training
    scores: list[TaskScore] = []
    samples: list[dict[str, Any]] = []
    try:
        for request, loaded in zip(requests, runs, strict=True):
            count = request.limit or limit
            if isinstance(loaded, str):
                scores.append(_skipped(request, loaded))
            elif request.name == "perplexity":
                scores.append(_perplexity(model, tokenizer, request, loaded, batch_size, reporter))
            else:
                found, rows = _generate_and_score(
                    model, tokenizer, request, loaded, count, batch_size, seed, reporter
                )
                scores += found
                samples += rows
    finally:
        model.train(was_training)
    if samples_path is not None:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in samples)
        samples_path.write_text("".join(lines), encoding="utf-8")
    return scores


def _prepare(
    request: TaskRequest,
    model: Any,
    allow_code_execution: bool,
    *,
    seed: int,
    limit: int | None,
    cap: int | None,
) -> Any:
    """Everything that the task needs from disk; or, as text, why it is skipped."""
    if request.name == "perplexity":
        return _perplexity_data(request, request.limit or limit)
    if request.name == "humaneval" and not allow_code_execution:
        return NEEDS_CODE_EXECUTION
    from loram_cli.evaluation import lmeval

    with lmeval.quiet(NullReporter(), {"task": request.name}):
        loaded = lmeval.build_tasks(request, cap, context_length(model), seed)
    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
        return _UNSAFE
    return loaded


def _skipped(request: TaskRequest, reason: str) -> TaskScore:
    metric = "pass@1" if request.name == "humaneval" else ""
    return TaskScore(request.name, metric, None, None, 0, request.bundled, skipped=reason)


def _perplexity_data(request: TaskRequest, limit: int | None) -> tuple[str, list[Any]]:
    """("pairs", rendered pairs) or ("texts", documents)."""
    if request.pairs is not None:
        return "pairs", list(request.pairs)[:limit]
    path = request.data_file
    if path is None:
        raise LoramError(
            "perplexity: no data", "give texts or instruction records: --task-data perplexity=FILE"
        )
    if path.suffix == ".txt":
        return "texts", [path.read_text(encoding="utf-8")]
    records = read_records(path, "perplexity")[:limit]
    if all(isinstance(record.get("text"), str) for record in records):
        return "texts", [record["text"] for record in records]
    return "pairs", [_render(record, f"{path}, record {i}") for i, record in enumerate(records, 1)]


def _render(record: dict[str, Any], where: str) -> tuple[str, str]:
    for asked, answered in _PAIR_FIELDS:
        if isinstance(record.get(asked), str) and isinstance(record.get(answered), str):
            if asked == "prompt":
                return record[asked], record[answered]
            return f"Question: {record[asked]}\nAnswer:", f" {record[answered]}"
    layouts = ", ".join("/".join(fields) for fields in _PAIR_FIELDS)
    raise LoramError(f"--task-data perplexity: {where}: none of {layouts}, text")


def _perplexity(
    model: Any,
    tokenizer: Any,
    request: TaskRequest,
    data: tuple[str, list[Any]],
    batch_size: int,
    reporter: Reporter,
) -> TaskScore:
    kind, items = data
    measure = answer_perplexity if kind == "pairs" else text_perplexity
    result = measure(model, tokenizer, items, batch_size=batch_size, reporter=reporter)
    if result.truncated:
        reporter.warn(f"perplexity: {result.truncated} records cut to the model's context")
    return TaskScore(
        "perplexity",
        "perplexity",
        result.perplexity,
        result.stderr,
        len(items),
        request.bundled,
        higher_is_better=False,
        detail=f"{result.tokens} {'answer ' if kind == 'pairs' else ''}tokens",
    )


def _generate_and_score(
    model: Any,
    tokenizer: Any,
    request: TaskRequest,
    loaded: Any,
    limit: int | None,
    batch_size: int,
    seed: int,
    reporter: Reporter,
) -> tuple[list[TaskScore], list[dict[str, Any]]]:
    from loram_cli.evaluation import lmeval

    with lmeval.quiet(reporter, {"task": request.name}), lmeval.seeded(seed):
        language_model = lmeval.LocalModel(model, tokenizer, batch_size)
        if request.name == "humaneval":
            task = loaded["tasks"]["humaneval"]
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            outputs = language_model.generate_until(task.instances)
            result = None
        else:
            from lm_eval import evaluator

            result = evaluator.evaluate(
                language_model, loaded, limit=limit, bootstrap_iters=100, log_samples=True
            )
    _warn_of_cut_prompts(language_model, loaded["tasks"].values(), reporter)
    if result is None:
        return _score_code(request, task, outputs, reporter)
    return _read_scores(request, result), _read_samples(result)


def _warn_of_cut_prompts(language_model: Any, tasks: Iterable[Any], reporter: Reporter) -> None:
    for task in tasks:
        if task.OUTPUT_TYPE != "generate_until" or not task.instances:
            continue
        room = language_model.max_length - task.config.generation_kwargs["max_gen_toks"]
        prompts = [instance.args[0] for instance in task.instances]
        cut = sum(len(language_model.tok_encode(prompt)) > room for prompt in prompts)
        if cut:
            reporter.warn(
                f"{task.task_name}: {cut} of {len(prompts)} prompts exceed {room} tokens and "
                "lost their start (ask for fewer few-shot examples)"
            )


def _score_code(
    request: TaskRequest, task: Any, outputs: list[str], reporter: Reporter
) -> tuple[list[TaskScore], list[dict[str, Any]]]:
    problems = [instance.doc for instance in task.instances]
    results = check_completions(problems, outputs, reporter=reporter)
    values = [pass_at_k(1, int(result.status == "passed"), 1) for result in results]
    mean = sum(values) / len(values)
    stderr = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    held = sorted({(result.network, result.files) for result in results})
    detail = "; ".join(f"network: {network}, files: {files}" for network, files in held)
    score = TaskScore(
        "humaneval",
        "pass@1",
        mean,
        stderr,
        len(values),
        request.bundled,
        num_fewshot=task.config.num_fewshot,
        detail=f"sandbox: {detail}",
    )
    rows = [
        {
            "task": "humaneval",
            "doc_id": problem["task_id"],
            "prompt": instance.args[0],
            "output": output,
            "target": problem.get("canonical_solution"),
            "correct": result.status == "passed",
            "detail": result.detail,
        }
        for instance, problem, output, result in zip(
            task.instances, problems, outputs, results, strict=True
        )
    ]
    return [score], rows


def _read_scores(request: TaskRequest, result: dict[str, Any]) -> list[TaskScore]:
    """Figures of lm-eval's results; groups (with their mean) before the tasks in them."""
    scores = []
    counts = {name: entry["effective"] for name, entry in result.get("n-samples", {}).items()}
    members = result.get("group_subtasks", {})
    rows = {**result.get("groups", {}), **result["results"]}
    for name, figures in rows.items():
        subtasks = [task for task in members.get(name, ()) if task in counts]
        samples = counts.get(name, sum(counts[task] for task in subtasks))
        better = result.get("higher_is_better", {}).get(name, {})
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    name,
                    metric if kind == "none" else key,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    int(samples),
                    request.bundled,
                    higher_is_better=better.get(metric) is not False,
                    num_fewshot=int(result.get("n-shot", {}).get(name) or 0),
                )
            )
    return scores


def _read_samples(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per document and filter."""
    rows = []
    for task, samples in result.get("samples", {}).items():
        for sample in samples:
            metric = next(iter(sample["metrics"]), None)
            rows.append(
                {
                    "task": task,
                    "doc_id": sample["doc_id"],
                    "filter": sample["filter"],
                    "prompt": sample["arguments"][0][0],
                    "output": sample["resps"][0][0],
                    "extracted": sample["filtered_resps"][0],
                    "target": sample["target"],
                    "correct": sample.get(metric),
                }
            )
    return rows
