"""HumanEval on an engine: sampling over temperatures, the sandbox's verdicts, pass@k."""

from collections.abc import Sequence
from statistics import stdev
from typing import TYPE_CHECKING, Any

from loram_cli.evaluation.humaneval import CodeSettings, check_completions, pass_at_k
from loram_cli.evaluation.intervals import normal_interval, wilson_interval
from loram_cli.evaluation.requests import TaskRequest, TaskScore
from loram_cli.evaluation.sandbox import SandboxResult
from loram_cli.reporting import Reporter

if TYPE_CHECKING:
    from loram_cli.evaluation.engine import Engine


def score_code(
    engine: "Engine",
    request: TaskRequest,
    task: Any,
    settings: CodeSettings,
    seed: int,
    reporter: Reporter,
) -> tuple[list[TaskScore], list[dict[str, Any]]]:
    """Generate at every temperature, run all programs, report the best temperature for each k.

    Returns:
        Scores, ``pass@1`` first, and one row per completion.
    """
    from loram_cli.evaluation.engine import generation

    instances = task.instances
    jobs, marks = [], []
    for temperature in settings.temperatures:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": settings.top_p}
        kwargs = {**task.config.generation_kwargs, **(sampling if temperature > 0 else {})}
        for place, instance in enumerate(instances):
            for number in range(settings.repeats(temperature)):
                jobs.append(generation(instance.args[0], kwargs, seed, number))
                marks.append((temperature, place, number))
    outputs = engine.generate(jobs)
    problems = [instances[place].doc for _, place, _ in marks]
    results = check_completions(problems, outputs, reporter=reporter)
    scores = _scores(request, task, settings, marks, results, len(instances))
    rows = [
        {
            "task": request.name,
            "doc_id": problem["task_id"],
            "temperature": temperature,
            "sample": number,
            "prompt": instances[place].args[0],
            "output": output,
            "target": problem.get("canonical_solution"),
            "correct": result.status == "passed",
            "detail": result.detail,
        }
        for (temperature, place, number), problem, output, result in zip(
            marks, problems, outputs, results, strict=True
        )
    ]
    return scores, rows


def _scores(
    request: TaskRequest,
    task: Any,
    settings: CodeSettings,
    marks: Sequence[tuple[float, int, int]],
    results: Sequence[SandboxResult],
    documents: int,
) -> list[TaskScore]:
    correct = {t: [0] * documents for t in settings.temperatures}
    for (temperature, place, _), result in zip(marks, results, strict=True):
        correct[temperature][place] += result.status == "passed"
    held = sorted({(result.network, result.files) for result in results})
    sandbox = "; ".join(f"network: {network}, files: {files}" for network, files in held)
    scores = []
    for k in settings.tries:
        by_temperature = {
            t: [_estimate(settings.repeats(t), count, k) for count in counts]
            for t, counts in correct.items()
        }
        means = {t: sum(values) / documents for t, values in by_temperature.items()}
        best = max(means, key=lambda t: means[t])
        values, mean = by_temperature[best], means[best]
        stderr = stdev(values) / documents**0.5 if documents > 1 else None
        if settings.repeats(best) == 1:
            interval: tuple[float, float] | None = wilson_interval(sum(values), documents)
        else:
            interval = normal_interval(mean, stderr, lowest=0.0, highest=1.0)
        listing = ", ".join(f"{t:g}: {value:.1%}" for t, value in means.items())
        chosen = f"best of temperatures {listing}; " if len(means) > 1 else ""
        drawn = f"{settings.samples} samples; " if settings.samples > 1 else ""
        scores.append(
            request.score(
                f"pass@{k}",
                mean,
                stderr,
                documents,
                interval,
                num_fewshot=task.config.num_fewshot or 0,
                detail=f"{chosen}{drawn}sandbox: {sandbox}",
            )
        )
    return scores


def _estimate(samples: int, correct: int, k: int) -> float:
    """pass@k of one problem; a greedy completion comes out the same however often it is drawn."""
    return float(correct) if samples == 1 else pass_at_k(samples, correct, k)
