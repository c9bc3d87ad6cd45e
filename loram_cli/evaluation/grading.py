"""Right or wrong, one answer at a time, exactly as an evaluation task scores it."""

from collections.abc import Callable

from loram_cli.errors import LoramError


def strict_grader(task: str = "gsm8k") -> Callable[[str, str], bool]:
    """Tells whether a completion is right, by a task's strict match.

    Stop texts, pattern and comparison are read from lm-eval's own file of the task, and its own
    functions apply them: what is rewarded in training is what ``eval`` counts.

    Args:
        task: lm-eval's name of a task with one answer to extract and ``exact_match``.

    Returns:
        A function of the completion and of the data set's answer.

    Raises:
        LoramError: The task has no strict match.
    """
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    from loram_cli.evaluation.lmeval import task_config

    config = task_config(task)
    filters = {f["name"]: f["filter"] for f in config.get("filter_list", [])}
    metrics = {m["metric"]: m for m in config.get("metric_list", [])}
    if "strict-match" not in filters or "exact_match" not in metrics:
        raise LoramError(f"lm-eval's task {task} has no strict match to reward")
    step = next(part for part in filters["strict-match"] if part["function"] == "regex")
    extract = RegexFilter(**{k: v for k, v in step.items() if k != "function"})
    names = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    how = {name: metrics["exact_match"][name] for name in names if name in metrics["exact_match"]}
    stops = config.get("generation_kwargs", {}).get("until", [])

    def is_right(completion: str, answer: str) -> bool:
        for stop in stops:
            completion = completion.split(stop)[0]
        ((found,),) = extract.apply([[completion]], [{}])
        return bool(exact_match_hf_evaluate([found], [answer], **how)["exact_match"])

    return is_right
