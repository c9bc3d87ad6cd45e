"""Evaluate several models on the same tasks, into one table."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import Reporter
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.core.plan import StagePlan
from loram_cli.stages.evaluate.models import parse_weights_memory
from loram_cli.stages.evaluate.plan import plan_eval
from loram_cli.stages.evaluate.rows import eval_inputs, score_row, warn_of_tokenizers

if TYPE_CHECKING:
    from loram_cli.evaluation.requests import TaskRequest

RESULTS_NAME = "results.json"
PLOT_NAME = "results.png"
ANSWERS_NAME = "responses"
AUTO = "auto"
_LABEL = re.compile(r"[\w][\w.-]*")
_DEMO_TASKS = ("gsm8k", "perplexity")


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """What to evaluate.

    Attributes:
        model: The original base.
        out: Where results and samples go.
        rows: Per row its model's directory and, if any, the adapter's.
        tasks: Task names.
        task_data: Local data by task name.
        demo_data: Use the demo's own held-out problems for gsm8k and perplexity.
        num_fewshot: Examples in the prompt; None for the task's own number.
        limit: Documents per task at most.
        batch_size: Documents per forward pass at most; ``auto`` grows while memory allows.
        max_new_tokens: Upper bound on generated tokens.
        code_samples: Completions per HumanEval problem and temperature; None takes 10 on the
            published problems and 1 on the bundled sample.
        temperatures: HumanEval's; None takes the paper's five when there are several samples,
            else 0.
        allow_code_execution: Run generated code, in the sandbox.
        backend: ``hf``, or ``vllm`` where it is installed.
        quantize: ``nf4`` holds the decoder linears in 4 bits, which changes answers a little.
        weights_memory: Memory for weights on the device, in bytes or as text such as ``20GiB``;
            layers beyond it are read anew at every pass. None takes most of what is free.
        seed: Decides few-shot draws and sampled texts.
        device: Where to run; a GPU when there is one.
        replace: Replace results of other settings or inputs that lie in ``out``.
        force: Evaluate again even if the same results are there, and forget kept answers.
    """

    model: Path
    out: Path
    rows: dict[str, tuple[Path, ...]]
    tasks: tuple[str, ...] = ("gsm8k", "perplexity")
    task_data: dict[str, Path] = field(default_factory=dict)
    demo_data: bool = False
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | str = AUTO
    max_new_tokens: int | None = None
    code_samples: int | None = None
    temperatures: tuple[float, ...] | None = None
    allow_code_execution: bool = False
    backend: Literal["hf", "vllm"] = "hf"
    quantize: Literal["nf4"] | None = None
    weights_memory: int | str | None = None
    seed: int = 1234
    device: str | None = None
    replace: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.batch_size != AUTO and (
            not isinstance(self.batch_size, int) or self.batch_size < 1
        ):
            raise UsageError(f"--batch-size {self.batch_size}: a number above 0 or auto is wanted")
        parse_weights_memory(self)
        for name in ("quantize", "weights_memory"):
            if self.backend != "hf" and getattr(self, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} is for --backend hf",
                    "vLLM has settings of its own",
                )
        for name in ("limit", "max_new_tokens", "code_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0")
        if not self.tasks:
            raise UsageError("--tasks is empty", "for example --tasks gsm8k,humaneval,perplexity")
        for name, file in self.task_data.items():
            if not file.exists():
                raise UsageError(f"--task-data {name}={file}: no such file")
        for label in self.rows:
            if not _LABEL.fullmatch(label):
                raise UsageError(f"row '{label}': letters, digits, '.', '_' and '-' are wanted")


def run(spec: EvalSpec, reporter: Reporter) -> StageResult:
    """Score every row on every task.

    Answers of a model are kept as they come: after an interruption nothing that was answered is
    asked again, nor with other tasks or rows what the results that are replaced had answered.

    Raises:
        LoramError: A task's data cannot be had, or a model cannot be loaded.
    """
    _, requests = _prepare(spec, reporter)
    inputs = eval_inputs(spec.rows, requests)
    stage = stage_run(
        "eval",
        spec,
        inputs,
        spec.model,
        resumable=True,
        replace=spec.replace,
    )
    with stage as opened:
        if opened.finished is not None:
            return opened.finished
        answers = opened.path / ANSWERS_NAME
        kept = spec.out / ANSWERS_NAME
        if kept.is_dir() and not answers.exists() and not spec.force:
            shutil.copytree(kept, answers)
        warn_of_tokenizers(inputs, reporter)
        rows = {
            label: score_row(spec, label, inputs, requests, answers, opened.path, reporter)
            for label in spec.rows
        }
        bundled = any(s["bundled"] for row in rows.values() for s in row["scores"])
        results = {"bundled": bundled, "quantize": spec.quantize, "rows": rows}
        _write_results(results, opened.path)
        return opened.commit(results, base={}, keep={})


def plan(spec: EvalSpec, reporter: Reporter) -> StagePlan:
    """What would be evaluated; everything is checked that needs no tensor.

    Raises:
        LoramError: A task's data cannot be had, or a model or an adapter is not whole.
    """
    return _prepare(spec, reporter)[0]


def _prepare(spec: EvalSpec, reporter: Reporter) -> "tuple[StagePlan, list[TaskRequest]]":
    if not spec.rows:
        raise UsageError("no row to evaluate", "run 'loram prune' first, or pass --row NAME=DIR")
    if spec.backend == "vllm":
        from loram_cli.evaluation.vllm_backend import check_available

        check_available()
    return plan_eval(spec), _requests(spec, reporter)


def export_results(result: StageResult, file: Path) -> None:
    """Write the comparison to a file of the user's choice, by its suffix.

    Raises:
        UsageError: Another suffix than ``.md``, ``.csv``, ``.json`` and ``.png``.
        LoramError: It cannot be written.
    """
    source = result.wrote / f"results{file.suffix}"
    if file.suffix not in (".md", ".csv", ".json", ".png"):
        raise UsageError(f"--export {file}: .md, .csv, .json or .png is wanted")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, file)
    except OSError as error:
        raise LoramError(f"--export {file}: cannot be written ({error.strerror})") from error


def _write_results(results: dict[str, Any], path: Path) -> None:
    from loram_cli.evaluation.comparison import to_csv, to_markdown
    from loram_cli.evaluation.plot import draw_comparison

    (path / RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (path / "results.md").write_text(to_markdown(results), "utf-8")
    (path / "results.csv").write_text(to_csv(results), "utf-8")
    draw_comparison(results, path / PLOT_NAME)


def _requests(spec: EvalSpec, reporter: Reporter) -> "list[TaskRequest]":
    from loram_cli.evaluation.requests import resolve_tasks

    others = [task for task in spec.tasks if not (spec.demo_data and task in _DEMO_TASKS)]
    found: list[TaskRequest] = []
    if others:
        found = resolve_tasks(
            others,
            spec.task_data,
            prefer_bundled=spec.demo_data,
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
        )
    for request in found:
        if request.bundled and not spec.demo_data:
            reporter.warn(
                f"{request.name}: the hub is out of reach and no --task-data {request.name}=FILE "
                "is given: a small bundled sample stands in for it"
            )
    if spec.demo_data:
        found = [*_demo_requests(spec), *found]
    return found


def _demo_requests(spec: EvalSpec) -> "list[TaskRequest]":
    from loram_cli.evaluation.requests import TaskRequest
    from loram_cli.training.data.documents import load_instructions

    examples = load_instructions("demo:test", limit=spec.limit)
    requests = {
        "gsm8k": TaskRequest(
            "gsm8k",
            bundled=True,
            num_fewshot=spec.num_fewshot or 0,
            source="demo:test",
            harness_task="gsm8k",
        ),
        "perplexity": TaskRequest("perplexity", bundled=True, examples=tuple(examples)),
    }
    return [requests[task] for task in spec.tasks if task in requests]
