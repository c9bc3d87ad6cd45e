"""What to evaluate: tasks, where their documents come from, and what comes back."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.errors import UsageError
from loram_cli.evaluation.catalog import CATALOG, OWN_PREFIX, named_task
from loram_cli.hub import hub_reachable
from loram_cli.reading import home_expanded
from loram_cli.schema import unknown_name
from loram_cli.training.data.examples import Example

_TRAIN_SUFFIX = ":train"


@dataclass(frozen=True)
class TaskRequest:
    """One task to run.

    Attributes:
        name: As shown: ``gsm8k``, ``humaneval``, ``perplexity``, or a name of lm-eval's.
        data_file: Documents (``.jsonl``, ``.jsonl.gz``, ``.json``, ``.parquet``; ``.txt`` for
            perplexity) in the data set's own published layout; None takes them from the hub.
        bundled: The documents are a small own-written sample and not the benchmark.
        num_fewshot: Solved examples in the prompt; None takes lm-eval's number for the task
            (none on a bundled sample).
        limit: Only the first documents; None takes all.
        train_file: Few-shot examples; None draws them from the same documents, the asked one
            left out (with data from the hub, the task's own few-shot split is used).
        examples: For ``perplexity``: rendered examples, instead of a file.
        harness_task: lm-eval's name of the task; empty where it is the same.
        variant: What a reader must know of how it is asked, such as ``CoT``.
        group: The named group that it is a member of.
        source: Documents that are no file, such as ``demo:test``.
    """

    name: str
    data_file: Path | None = None
    bundled: bool = False
    num_fewshot: int | None = None
    limit: int | None = None
    train_file: Path | None = None
    examples: tuple[Example, ...] | None = None
    harness_task: str = ""
    variant: str = ""
    group: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("num_fewshot", "limit"):
            value = getattr(self, field)
            if value is not None and value < (field == "limit"):
                raise UsageError(f"{self.name}: {field} {value} is too small")

    @property
    def documents(self) -> str:
        """Where its documents are read from; empty when the hub gives them."""
        return self.source or (str(self.data_file) if self.data_file is not None else "")

    @property
    def asks(self) -> bool:
        """Whether it puts questions; code is completed, and a text's perplexity is measured."""
        return self.lm_eval_name not in ("humaneval", "perplexity")

    @property
    def lm_eval_name(self) -> str:
        """lm-eval's name of the task."""
        return self.harness_task or self.name

    def score(
        self,
        metric: str,
        value: float | None,
        stderr: float | None = None,
        samples: int = 0,
        interval: tuple[float, float] | None = None,
        **more: Any,
    ) -> "TaskScore":
        """A figure of the task; ``more`` are fields of :class:`TaskScore`."""
        low, high = interval or (None, None)
        own = {"task": self.name, "variant": self.variant, "group": self.group, **more}
        return TaskScore(
            metric=metric,
            value=value,
            stderr=stderr,
            samples=samples,
            bundled=self.bundled,
            ci_low=low,
            ci_high=high,
            **own,
        )


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Attributes:
        metric: ``exact_match,strict-match``, ``pass@1``, ``perplexity``, ...; a task's headline
            metric comes first.
        value: The figure; None when skipped.
        samples: Documents that it is over.
        bundled: Whether they are a small own-written sample.
        skipped: Why the task did not run.
        detail: What a reader of the figure should know, such as the sandbox's confinement.
        ci_low: Lower end of the 95% confidence interval, None where there is none.
        group: The group that the task is a member of.
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
    ci_low: float | None = None
    ci_high: float | None = None
    variant: str = ""
    group: str = ""


def resolve_tasks(
    names: Sequence[str],
    task_data: Mapping[str, Path],
    *,
    prefer_bundled: bool,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> list[TaskRequest]:
    """Decide what each name stands for and where its documents come from.

    In this order: the file in ``task_data``; the bundled sample, when preferred or when neither
    the hub nor its cache can give the data; the hub. ``task_data`` may also hold
    ``NAME:train``, the file of few-shot examples. A group is one request for each member, and
    its files go by the members' names.

    Raises:
        UsageError: No task, a file for a task that is not asked for, or a file that is not there.
    """
    if not names:
        raise UsageError("no task to evaluate", "name some: --tasks gsm8k,humaneval,perplexity")
    _check_files(names, task_data)
    requests: list[TaskRequest] = []
    for name in dict.fromkeys(names):
        members = named_task(name).members
        if len(members) == 1:
            found = [_request(name, task_data, prefer_bundled, num_fewshot, limit)]
        else:
            found = [
                _request(member, task_data, False, num_fewshot, limit, group=name)
                for member in members
            ]
        requests += found
    return requests


def _check_files(names: Sequence[str], task_data: Mapping[str, Path]) -> None:
    taking: list[str] = []
    for name in names:
        members = named_task(name).members
        taking += members if len(members) > 1 else (name,)
    for key, path in task_data.items():
        name = key.removesuffix(_TRAIN_SUFFIX)
        if name in names and name not in taking:
            raise UsageError(
                f"--task-data {key}: '{name}' is a group", f"name its tasks: {', '.join(taking)}"
            )
        if name not in taking:
            raise unknown_name("task", key, taking, "--task-data")
        if not path.is_file():
            raise UsageError(f"--task-data {key}: {path} is not a file")


def _request(
    name: str,
    task_data: Mapping[str, Path],
    prefer_bundled: bool,
    num_fewshot: int | None,
    limit: int | None,
    *,
    group: str = "",
) -> TaskRequest:
    entry = named_task(name)
    data_file, bundled = task_data.get(name), False
    if data_file is None and entry.sample is not None:
        bundled = prefer_bundled or entry.hub_data is None or not _hub_has(entry.hub_data)
        data_file = entry.sample if bundled else None
    train_file = task_data.get(name + _TRAIN_SUFFIX)
    if train_file is not None and data_file is None:
        raise UsageError(
            f"--task-data {name}{_TRAIN_SUFFIX} without --task-data {name}",
            f"give both files: --task-data {name}=FILE",
        )
    if train_file is not None and name == "gsm8k":
        raise UsageError(
            "--task-data gsm8k:train: the chain-of-thought examples of gsm8k are the published "
            "eight",
            f"lm-eval's plain task takes examples: --tasks {OWN_PREFIX}gsm8k",
        )
    own_number = CATALOG[group].num_fewshot if group else entry.num_fewshot
    shots = own_number if num_fewshot is None else num_fewshot
    harness_task, variant = entry.members[0], entry.variant
    if bundled:
        shots, harness_task, variant = num_fewshot or 0, entry.sample_task or name, ""
    return TaskRequest(
        name,
        data_file,
        bundled,
        shots,
        limit,
        train_file,
        harness_task=harness_task if harness_task != name else "",
        variant=variant,
        group=group,
    )


def _hub_has(dataset: str) -> bool:
    """Whether the data set is in the local cache or the hub can be asked for it."""
    home = home_expanded(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    datasets_cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    cached = (
        hub_cache / f"datasets--{dataset.replace('/', '--')}" / "snapshots",
        datasets_cache / dataset.replace("/", "___"),
    )
    return any(path.is_dir() for path in cached) or hub_reachable()
