"""Scores a model on tasks: lm-eval's tasks, our perplexity and code sandbox beside."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loram_cli.checkpoint.tokenizer_files import encoding
from loram_cli.errors import LoramError
from loram_cli.evaluation.code_tasks import score_code
from loram_cli.evaluation.documents import perplexity_data
from loram_cli.evaluation.humaneval import CodeSettings
from loram_cli.evaluation.perplexity import answer_perplexity, text_perplexity
from loram_cli.evaluation.requests import TaskRequest, TaskScore
from loram_cli.evaluation.scores import read_samples, read_scores, with_group_means
from loram_cli.quiet import quiet_lm_eval
from loram_cli.reporting import NullReporter, Reporter

if TYPE_CHECKING:
    from loram_cli.evaluation.engine import Engine

NEEDS_CODE_EXECUTION = "needs --allow-code-execution (runs generated code in a sandbox)"
_UNSAFE = "lm-eval would run its generated code unconfined; of such tasks only humaneval runs here"


def evaluate_model(
    engine: "Engine",
    requests: Sequence[TaskRequest],
    *,
    limit: int | None = None,
    allow_code_execution: bool = False,
    code: CodeSettings | None = None,
    seed: int = 1234,
    max_new_tokens: int | None = None,
    reporter: Reporter | None = None,
    samples_path: Path | None = None,
) -> list[TaskScore]:
    """Run all tasks on one model.

    All documents are loaded before the engine loads its model, so that a bad file costs no time.
    Tasks are lm-eval's own (prompts, stops, filters, metrics) whatever their documents;
    ``humaneval`` has the prompt and stops of lm-eval's and is scored in the sandbox.

    Args:
        engine: Of the model.
        requests: Tasks, see :func:`.requests.resolve_tasks`.
        limit: First documents of every task that has no limit of its own.
        allow_code_execution: Run generated code; without it ``humaneval`` is skipped.
        code: How ``humaneval`` is sampled; by default once, greedily.
        seed: Of the few-shot draw, and of sampling where a task samples.
        max_new_tokens: Cap for generated tokens; None keeps each task's (gsm8k 256, humaneval
            1024); never more than half the model's context.
        reporter: Receives progress and warnings.
        samples_path: Write every document's prompt, output, target and correctness (JSON lines).

    Returns:
        One score per task and metric, each task's headline metric first, and a group's mean
        before its members.

    Raises:
        UsageError: Unknown task or too few few-shot examples.
        LoramError: Documents that are missing or cannot be read; names the flag.
    """
    reporter = reporter or NullReporter()
    runs = [
        _prepare(request, engine, allow_code_execution, seed=seed, limit=limit, cap=max_new_tokens)
        for request in requests
    ]
    scores: list[TaskScore] = []
    samples: list[dict[str, Any]] = []
    for request, loaded in zip(requests, runs, strict=True):
        engine.report_to(reporter, request.name)
        count = request.limit or limit
        if isinstance(loaded, str):
            metric = "pass@1" if request.lm_eval_name == "humaneval" else ""
            scores.append(request.score(metric, None, skipped=loaded))
        elif request.name == "perplexity":
            scores.append(_perplexity(engine, request, loaded, reporter))
        else:
            found, rows = _run_task(
                engine, request, loaded, count, seed, code or CodeSettings(), reporter
            )
            scores += found
            samples += rows
    if samples_path is not None:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in samples)
        samples_path.write_text("".join(lines), encoding="utf-8")
    return with_group_means(scores)


def _prepare(
    request: TaskRequest,
    engine: "Engine",
    allow_code_execution: bool,
    *,
    seed: int,
    limit: int | None,
    cap: int | None,
) -> Any:
    """Everything that the task needs from disk; or, as text, why it is skipped."""
    if request.name == "perplexity":
        return _perplexity_data(request, engine.tokenizer, request.limit or limit)
    if request.lm_eval_name == "humaneval" and not allow_code_execution:
        return NEEDS_CODE_EXECUTION
    from loram_cli.evaluation import lmeval

    with quiet_lm_eval(), _seeded(seed):
        loaded = lmeval.build_tasks(request, cap, engine.context_tokens, seed)
    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
        return _UNSAFE
    return loaded


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python and torch for tasks that draw; give the caller's states back afterwards."""
    state = random.getstate()
    with torch.random.fork_rng():
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def _perplexity_data(
    request: TaskRequest, tokenizer: Any, limit: int | None
) -> tuple[list[Any], list[str]]:
    if request.examples is not None:
        return list(request.examples)[:limit], []
    if request.data_file is None:
        raise LoramError(
            "perplexity: no data", "give texts or instruction records: --task-data perplexity=FILE"
        )
    return perplexity_data(request.data_file, tokenizer, limit)


def _perplexity(
    engine: "Engine",
    request: TaskRequest,
    data: tuple[list[Any], list[str]],
    reporter: Reporter,
) -> TaskScore:
    examples, texts = data
    # The model is loaded here where this is the first task, and lm-eval has its say on that too.
    with quiet_lm_eval():
        if examples:
            result = answer_perplexity(engine, engine.tokenizer, examples, engine.context_tokens)
        else:
            result = text_perplexity(engine, engine.tokenizer, texts, engine.context_tokens)
    if result.truncated:
        reporter.warn(f"perplexity: {result.truncated} records cut to the model's context")
    return request.score(
        "perplexity",
        result.perplexity,
        result.stderr,
        len(examples) or len(texts),
        result.interval,
        higher_is_better=False,
        detail=f"{result.tokens} {'answer ' if examples else ''}tokens",
    )


def _run_task(
    engine: "Engine",
    request: TaskRequest,
    loaded: Any,
    limit: int | None,
    seed: int,
    code: CodeSettings,
    reporter: Reporter,
) -> tuple[list[TaskScore], list[dict[str, Any]]]:
    with quiet_lm_eval(), _seeded(seed):
        if request.lm_eval_name == "humaneval":
            task = loaded["tasks"]["humaneval"]
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            _warn_of_cut_prompts(engine, [task], reporter)
            return score_code(engine, request, task, code, seed, reporter)
        from lm_eval import evaluator

        result = evaluator.evaluate(
            engine,
            loaded,
            limit=limit,
            bootstrap_iters=100,
            log_samples=True,
            apply_chat_template=engine.chat,
            # As lm-eval itself does with a template: each solved example is two turns.
            fewshot_as_multiturn=engine.chat,
        )
    _warn_of_cut_prompts(engine, loaded["tasks"].values(), reporter)
    return read_scores(request, result), read_samples(request, result)


def _warn_of_cut_prompts(engine: "Engine", tasks: Any, reporter: Reporter) -> None:
    for task in tasks:
        if not task.instances:
            continue
        if task.OUTPUT_TYPE == "generate_until":
            room = engine.context_tokens - task.config.generation_kwargs["max_gen_toks"]
            prompts = [instance.args[0] for instance in task.instances]
        elif task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
            # The last token of an answer is asked for and not read.
            room = engine.context_tokens + 1
            prompts = ["".join(instance.args[:2]) for instance in task.instances]
        else:  # whole texts go in windows
            continue
        with encoding(engine.tokenizer):
            lengths = map(len, engine.tokenizer(prompts, verbose=False)["input_ids"])
        cut = sum(length > room for length in lengths)
        if cut:
            reporter.warn(
                f"{task.task_name}: {cut} of {len(prompts)} prompts exceed {room} tokens and "
                "lost their start (ask for fewer few-shot examples)"
            )
