"""What to evaluate: tasks, where their documents come from, and what comes back."""

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError, UsageError
from loram_cli.hub import hub_reachable
from loram_cli.specs import unknown_name

_BUNDLED_DIR = Path(__file__).parent / "tasks"
_BUNDLED = {
    "gsm8k": _BUNDLED_DIR / "gsm8k_sample.jsonl",
    "humaneval": _BUNDLED_DIR / "humaneval_sample.jsonl",
    "perplexity": _BUNDLED_DIR / "gsm8k_sample.jsonl",
}
_HUB_DATA = {"gsm8k": "openai/gsm8k", "humaneval": "openai/openai_humaneval"}
# Fields of a record, by the task whose published layout names them.
_REQUIRED_FIELDS = {
    "gsm8k": ("question", "answer"),
    "humaneval": ("task_id", "prompt", "test", "entry_point"),
}
_TRAIN_SUFFIX = ":train"


@dataclass(frozen=True)
class TaskRequest:
    """One task to run.

    Args:
        name: ``gsm8k``, ``humaneval``, ``perplexity``, or any name that lm-eval knows.
        data_file: Documents (``.jsonl``, ``.jsonl.gz``, ``.json``; ``.txt`` for perplexity) in
            the data set's own published layout; None takes them from the hub.
        bundled: The documents are a small own-written sample and not the benchmark.
        num_fewshot: Solved examples in the prompt; None takes the task's default (gsm8k: 5; 0 on
            a bundled sample).
        limit: Only the first documents; None takes all.
        train_file: Few-shot examples; None draws them from the same documents, the asked one
            left out (with data from the hub, the task's own few-shot split is used).
        pairs: For ``perplexity``: rendered (prompt, completion) pairs, instead of a file.
    """

    name: str
    data_file: Path | None = None
    bundled: bool = False
    num_fewshot: int | None = None
    limit: int | None = None
    train_file: Path | None = None
    pairs: tuple[tuple[str, str], ...] | None = None

    def __post_init__(self) -> None:
        for field in ("num_fewshot", "limit"):
            value = getattr(self, field)
            if value is not None and value < (field == "limit"):
                raise UsageError(f"{self.name}: {field} {value} is too small")


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Args:
        task: The task's name.
        metric: ``exact_match,strict-match``, ``pass@1``, ``perplexity``, ...; a task's headline
            metric comes first.
        value: The figure; None when skipped.
        stderr: Standard error of the figure, None where there is none.
        samples: Documents scored.
        bundled: As in the request.
        skipped: Why the task did not run.
        higher_is_better: Which way is better.
        num_fewshot: Solved examples that the prompt held.
        detail: What a reader of the figure should know, such as the sandbox's confinement.
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    samples: int
    bundled: bool
    skipped: str | None = None
    higher_is_better: bool = True
    num_fewshot: int = 0
    detail: str = ""


def resolve_tasks(
    names: Sequence[str],
    task_data: Mapping[str, Path],
    *,
    prefer_bundled: bool,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> list[TaskRequest]:
    """Decide where each task's documents come from.

    In this order: the file in ``task_data``; the bundled sample, when preferred or when neither
    the hub nor its cache can give the data; the hub. ``task_data`` may also hold
    ``NAME:train``, the file of few-shot examples.

    Args:
        names: Task names; repeated ones count once.
        task_data: Files by task name.
        prefer_bundled: Take the bundled samples even where the hub could be reached.
        num_fewshot: See :class:`TaskRequest`.
        limit: See :class:`TaskRequest`.

    Raises:
        UsageError: No task, a file for a task that is not asked for, or a file that is not there.
    """
    if not names:
        raise UsageError("no task to evaluate", "name some: --tasks gsm8k,humaneval,perplexity")
    for key, path in task_data.items():
        if key.removesuffix(_TRAIN_SUFFIX) not in names:
            raise unknown_name("task", key, names, "--task-data")
        if not path.is_file():
            raise UsageError(f"--task-data {key}: {path} is not a file")
    requests = []
    for name in dict.fromkeys(names):
        data_file, bundled = task_data.get(name), False
        if data_file is None and name in _BUNDLED:
            bundled = prefer_bundled or name not in _HUB_DATA or not _hub_has(_HUB_DATA[name])
            data_file = _BUNDLED[name] if bundled else None
        train_file = task_data.get(name + _TRAIN_SUFFIX)
        if train_file is not None and data_file is None:
            raise UsageError(
                f"--task-data {name}{_TRAIN_SUFFIX} without --task-data {name}",
                f"give both files: --task-data {name}=FILE",
            )
        requests.append(TaskRequest(name, data_file, bundled, num_fewshot, limit, train_file))
    return requests


def read_records(path: Path, task: str) -> list[dict[str, Any]]:
    """The records of a data file, each with the fields that the task's layout demands.

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.json`` (a list of records, also gzipped).
        task: The task, for its fields and for errors.

    Raises:
        LoramError: The file cannot be read, is no JSON, is empty, or a record lacks a field;
            names the line.
    """
    where = f"--task-data {task}: {path}"
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LoramError(f"{where}: cannot be read ({error})") from error
    records: list[tuple[str, Any]] = []
    if path.name.removesuffix(".gz").endswith(".json") and text.lstrip().startswith("["):
        try:
            records = [(f"record {i}", record) for i, record in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise LoramError(f"{where}, line {error.lineno}: not JSON ({error.msg})") from error
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                records.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise LoramError(f"{where}, line {number}: not JSON ({error.msg})") from error
    if not records:
        raise LoramError(f"{where}: holds no record")
    for place, record in records:
        if not isinstance(record, dict):
            raise LoramError(f"{where}, {place}: a JSON object is wanted")
        for field in _REQUIRED_FIELDS.get(task, ()):
            if not isinstance(record.get(field), str):
                raise LoramError(f"{where}, {place}: field '{field}' is missing or not text")
    return [record for _, record in records]


def _hub_has(dataset: str) -> bool:
    """Whether the data set is in the local cache or the hub can be asked for it."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    datasets_cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    cached = (
        hub_cache / f"datasets--{dataset.replace('/', '--')}" / "snapshots",
        datasets_cache / dataset.replace("/", "___"),
    )
    return any(path.is_dir() for path in cached) or hub_reachable()
