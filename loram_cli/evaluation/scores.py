"""From lm-eval's results to scores with confidence intervals, and to sample rows."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import stdev
from typing import Any

from loram_cli.evaluation.intervals import normal_interval, wilson_interval
from loram_cli.evaluation.requests import TaskRequest, TaskScore

_SHARES = ("acc", "acc_norm", "exact_match", "em")
GROUP_METRIC = "mean acc"


def read_scores(request: TaskRequest, result: dict[str, Any]) -> list[TaskScore]:
    """Figures of lm-eval's results; groups (with their mean) before the tasks in them."""
    scores = []
    counts = {name: entry["effective"] for name, entry in result.get("n-samples", {}).items()}
    members = result.get("group_subtasks", {})
    rows = {**result.get("groups", {}), **result["results"]}
    for name, figures in rows.items():
        subtasks = [task for task in members.get(name, ()) if task in counts]
        samples = int(counts.get(name, sum(counts[task] for task in subtasks)))
        better = result.get("higher_is_better", {}).get(name, {})
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            if metric in _SHARES and name in counts:
                interval = wilson_interval(value * samples, samples) if samples else None
            else:
                interval = normal_interval(float(value), stderr)
            scores.append(
                request.score(
                    metric if kind == "none" else key,
                    float(value),
                    stderr,
                    samples,
                    interval,
                    task=request.name if name == request.lm_eval_name else name,
                    higher_is_better=better.get(metric) is not False,
                    num_fewshot=int(result.get("n-shot", {}).get(name) or 0),
                )
            )
    return scores


def with_group_means(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Put before the members of each group their mean, and in words their spread.

    The mean is that of every member's headline figure (``acc``), each member counting the same.
    """
    result: list[TaskScore] = []
    for place, score in enumerate(scores):
        if score.group and all(s.group != score.group for s in scores[:place]):
            result.append(_group_mean(score.group, scores))
        result.append(score)
    return result


def _group_mean(group: str, scores: Sequence[TaskScore]) -> TaskScore:
    headline: dict[str, TaskScore] = {}
    for score in scores:
        if score.group == group:
            headline.setdefault(score.task, score)
    members = list(headline.values())
    first = members[0]
    skipped = next((m.skipped for m in members if m.skipped), None)
    if skipped:
        return replace(first, task=group, metric=GROUP_METRIC, skipped=skipped, group="")
    values = [m.value or 0.0 for m in members]
    errors = [m.stderr for m in members if m.stderr is not None]
    mean = sum(values) / len(values)
    stderr = math.sqrt(sum(e**2 for e in errors)) / len(values) if len(errors) == len(values) else 0
    interval = normal_interval(mean, stderr or None, lowest=0.0, highest=1.0)
    low, high = interval or (None, None)
    spread = f", std over tasks {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return replace(
        first,
        task=group,
        metric=GROUP_METRIC,
        value=mean,
        stderr=stderr or None,
        samples=sum(m.samples for m in members),
        detail=f"mean of {first.metric} over {len(values)} tasks{spread}",
        ci_low=low,
        ci_high=high,
        group="",
    )


def read_samples(request: TaskRequest, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per document and filter; of a multiple choice the likeliest one is the output."""
    rows = []
    for task, samples in result.get("samples", {}).items():
        name = request.name if task == request.lm_eval_name else task
        for sample in samples:
            metric = next(iter(sample["metrics"]), None)
            arguments = sample["arguments"]
            row = {
                "task": name,
                "doc_id": sample["doc_id"],
                "filter": sample["filter"],
                "prompt": arguments[0][0],
                "output": sample["resps"][0][0],
                "extracted": sample["filtered_resps"][0],
                "target": sample["target"],
                "correct": sample.get(metric),
            }
            if len(arguments) > 1 and isinstance(row["output"], tuple | list):
                row |= _choice(sample, arguments)
            rows.append(row)
    return rows


def _choice(sample: dict[str, Any], arguments: list[Any]) -> dict[str, Any]:
    """What a multiple choice came to: options, the likeliest, and the right one."""
    logprobs = [response[0][0] for response in sample["resps"]]
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    same_context = len({a[0] for a in arguments}) == 1
    options = [a[1] if same_context else a[0] for a in arguments]
    target = sample["target"]
    # By text: a target of thousands of digits is no index, and Python refuses to convert it.
    named = {str(place): option.strip() for place, option in enumerate(options)}
    return {
        "output": options[best].strip(),
        "extracted": None,
        "logprobs": [round(value, 4) for value in logprobs],
        "target": named.get(str(target) if isinstance(target, int | str) else "", target),
    }
