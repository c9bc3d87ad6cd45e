"""Evaluate several models on the same tasks, into one table."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.sources import require_tokenizer
from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.catalog import CATALOG, CSR
from loram_cli.evaluation.documents import check_documents
from loram_cli.evaluation.models import check_weights_memory, model_bytes
from loram_cli.evaluation.requests import TaskRequest, resolve_tasks
from loram_cli.evaluation.results import EvalResult
from loram_cli.evaluation.vllm_backend import check_available
from loram_cli.modeling.load import usable_device, warn_of_unused_gpu
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.runs.staging import look_up
from loram_cli.stages.core.lifecycle import StageResult, stage_run
from loram_cli.stages.core.plan import StagePlan, find_finished, free_disk, is_done
from loram_cli.stages.evaluate.results import write_results
from loram_cli.stages.evaluate.rows import (
    as_chat,
    checked_models,
    eval_inputs,
    score_row,
    warn_of_tokenizers,
)
from loram_cli.stages.evaluate.spec import EvalSpec
from loram_cli.training.data.documents import load_instructions
from loram_cli.training.data.files import require_regular

__all__ = ["EvalSpec", "plan", "run"]

ANSWERS_NAME = "responses"
EXPORTS = (".md", ".csv", ".json", ".png")
_DEMO_TASKS = ("gsm8k", "perplexity")


@dataclass(frozen=True)
class EvalWork:
    """An evaluation's models by directory, opened, and its tasks."""

    models: dict[Path, Model]
    requests: tuple[TaskRequest, ...]


def plan(spec: EvalSpec, reporter: Reporter, *, count: bool = False) -> StagePlan[EvalWork]:
    """Check every row's model and adapter and every file of data; a dry run reads the documents.

    The memory is that of the largest row's weights; rows are scored one after another. Of a model
    that takes more than there is, layers are read anew at every pass.

    Raises:
        LoramError: A model is not whole, an adapter is not one, or a task's data cannot be read.
        UsageError: There is no row, or the output is something else's.
    """
    if not spec.rows:
        raise UsageError("no row to evaluate", "run 'loram prune' first, or pass --row NAME=DIR")
    if spec.backend == "vllm":
        check_available()
    usable_device(spec.device)
    look_up(spec.out, "eval", "", force=True)
    require_tokenizer(spec.model)
    models = checked_models(spec.rows, reporter)
    nf4 = spec.quantize is not None
    if spec.weights_memory is not None:
        for model, label in {models[parts[0]]: label for label, parts in spec.rows.items()}.items():
            check_weights_memory(label, model, spec.weights_memory, device=spec.device, nf4=nf4)
    params = {label: models[parts[0]].num_params for label, parts in spec.rows.items()}
    for name, file in spec.task_data.items():
        _check_readable(f"--task-data {name}", file)
    requests = tuple(_requests(spec, reporter))
    if count:
        for request in requests:
            check_documents(request)
    inputs = eval_inputs(spec.rows, models, requests)
    for label, parts in spec.rows.items():
        if as_chat(spec, parts):
            inputs[f"row {label}"]["asked"] = "chat template"
    if not spec.replace:
        find_finished("eval", spec, inputs)
    return StagePlan(
        stage="eval",
        reads=tuple(dict.fromkeys(str(part) for parts in spec.rows.values() for part in parts)),
        writes=spec.out,
        work=EvalWork(models, requests),
        inputs=inputs,
        done=is_done("eval", spec, inputs),
        free_bytes=free_disk(spec.out),
        memory_bytes=max(
            model_bytes(model, device=spec.device, nf4=nf4) for model in models.values()
        ),
        figures={"rows": params, "tasks": list(spec.tasks), "limit": spec.limit},
    )


def run(spec: EvalSpec, reporter: Reporter) -> StageResult:
    """Score every row on every task.

    Answers of a model are kept as they come: after an interruption nothing that was answered is
    asked again, nor with other tasks or rows what the results that are replaced had answered.

    Raises:
        LoramError: See :func:`plan`; also a model that cannot be loaded.
    """
    planned = plan(spec, reporter)
    work = planned.work
    stage = stage_run(planned, spec, spec.model, resumable=True, replace=spec.replace)
    with stage as opened:
        if opened.finished is not None:
            return opened.finished
        answers = opened.path / ANSWERS_NAME
        kept = spec.out / ANSWERS_NAME
        if kept.is_dir() and not answers.exists() and not spec.force:
            shutil.copytree(kept, answers)
        warn_of_unused_gpu(spec.device, reporter)
        warn_of_tokenizers(planned.inputs, reporter)
        rows = {}
        for label, parts in spec.rows.items():
            model = work.models[parts[0]]
            rows[label] = score_row(
                spec, label, model, planned.inputs, work.requests, answers, opened.path, reporter
            )
        result = EvalResult(
            bundled=any(score.bundled for row in rows.values() for score in row.scores),
            quantize=spec.quantize,
            rows=rows,
        )
        write_results(result, opened.path)
        return opened.commit(result)


def export_results(result: StageResult, file: Path) -> None:
    """Write the comparison to a file of the user's choice, by its suffix.

    Raises:
        UsageError: Another suffix than ``.md``, ``.csv``, ``.json`` and ``.png``.
        LoramError: It cannot be written.
    """
    source = result.wrote / f"results{file.suffix}"
    if file.suffix not in EXPORTS:
        raise UsageError(f"--export {file}: expected .md, .csv, .json or .png")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, file)
    except OSError as error:
        raise LoramError(f"--export {file}: cannot be written ({error.strerror})") from error


def _check_readable(flag: str, file: Path) -> None:
    require_regular(file)
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise LoramError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    if empty:
        raise LoramError(f"{flag}: {file} is empty")


def check_tasks(spec: EvalSpec) -> None:
    """Check every task's name, data and examples; no row need be there yet.

    Raises:
        LoramError: Data of a task cannot be read.
        UsageError: A task is unknown, or has no such data.
    """
    for name, file in spec.task_data.items():
        _check_readable(f"--task-data {name}", file)
    _requests(spec, NullReporter())


def _requests(spec: EvalSpec, reporter: Reporter) -> list[TaskRequest]:
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
    for request in found:
        if not request.group and request.name not in (*CATALOG, *CSR):
            from loram_cli.evaluation.lmeval import require_task

            require_task(request.lm_eval_name)
    if spec.demo_data:
        found = [*_demo_requests(spec), *found]
    return found


def _demo_requests(spec: EvalSpec) -> list[TaskRequest]:
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
