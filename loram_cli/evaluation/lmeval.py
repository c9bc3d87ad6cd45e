"""The door to lm-eval's tasks: found by name, filled with local documents, kept silent.

Imports lm-eval (about four seconds); :mod:`.harness` imports this module only when it runs.
"""

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.catalog import CATALOG
from loram_cli.evaluation.documents import task_documents
from loram_cli.evaluation.humaneval import TASK_CONFIG as HUMANEVAL_CONFIG
from loram_cli.evaluation.requests import TaskRequest
from loram_cli.hub import hub_reachable, offline_libraries
from loram_cli.schema import unknown_name

_TASKS_DIR = Path(lm_eval.__file__).parent / "tasks"
_DEFAULT_GENERATED_TOKENS = 256
# Where lm-eval keeps the catalogue's tasks: its whole index takes ten seconds to read.
_FILES = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


def build_tasks(request: TaskRequest, max_new_tokens: int | None, context: int, seed: int) -> Any:
    """The request's lm-eval tasks with their documents loaded.

    Args:
        request: What to run.
        max_new_tokens: Cap for generated tokens; None keeps the task's own.
        context: The model's context in tokens; at most half of it goes to generated text.
        seed: Of the few-shot draw.

    Returns:
        A dict as ``TaskManager.load`` gives it, with ``tasks`` and ``groups``.

    Raises:
        UsageError: lm-eval does not know the name, or the examples do not suffice.
        LoramError: Cannot get the documents.
    """
    name = request.lm_eval_name
    with _metrics_of_the_hub():
        config, manager, is_python = _find(name)
        if not request.documents:
            loaded = _hub_tasks(request, config, manager)
        elif is_python and manager is not None:
            loaded = _local_python_task(request, manager)
        else:
            loaded = {"tasks": {name: _local_task(request, config)}, "groups": {}}
    for task in loaded["tasks"].values():
        _set_fewshot(task, request, seed)
        if task.OUTPUT_TYPE == "generate_until":
            kwargs = task.config.generation_kwargs
            own_cap = int(kwargs.get("max_gen_toks") or _DEFAULT_GENERATED_TOKENS)
            kwargs["max_gen_toks"] = max(1, min(max_new_tokens or own_cap, own_cap, context // 2))
    return loaded


def task_config(name: str) -> dict[str, Any]:
    """Lm-eval's own config of one of the catalogue's tasks."""
    return load_yaml(_TASKS_DIR / _FILES[name], resolve_func=True)


def _set_fewshot(task: Any, request: TaskRequest, seed: int) -> None:
    default = task.get_config("num_fewshot")
    wanted = default or 0
    # As lm-eval has it: a task whose own config says zero takes no examples at all.
    if default != 0 and request.num_fewshot is not None:
        wanted = request.num_fewshot
    fixed = getattr(task.fewshot_cfg, "samples", None)
    pool = len(task.sampler.df) if wanted else 0
    own = 0 if fixed else int(task.fewshot_cfg.split == task.config.test_split)
    if wanted and wanted > pool - own:
        hint = f"ask for fewer, or give a file: --task-data {request.name}:train=FILE"
        raise UsageError(
            f"{request.name}: expected {wanted} few-shot examples, found {pool - own}",
            "ask for fewer" if fixed else hint,
        )
    task.set_config("num_fewshot", wanted)
    task.set_fewshot_seed(seed)


def _find(name: str) -> tuple[dict[str, Any] | None, TaskManager | None, bool]:
    """The task's config (None for a group or tag), its manager, and whether it is Python."""
    if name == "humaneval":
        return copy.deepcopy(HUMANEVAL_CONFIG), None, False
    if name in _FILES:
        return task_config(name), None, False
    manager = _manager_of(name)
    entry = manager.task_index[name]
    if entry.kind.name == "PY_TASK":
        return None, manager, True
    if entry.kind.name != "TASK" or entry.yaml_path is None:
        return None, manager, False
    return load_yaml(entry.yaml_path, resolve_func=True), manager, False


def require_task(name: str) -> None:
    """Refuse a name that is no task of lm-eval's.

    Raises:
        UsageError: It is none.
    """
    if name not in ("humaneval", *_FILES):
        _manager_of(name)


@cache
def _manager_of(name: str) -> TaskManager:
    """A manager that knows a task of lm-eval's."""
    # The whole index takes lm-eval ten seconds: first ask the folders that mention the name.
    folders = {
        path.relative_to(_TASKS_DIR).parts[0]
        for path in _TASKS_DIR.rglob("*.yaml")
        if name in path.read_text(errors="replace")
    }
    manager = TaskManager(
        include_defaults=False, include_path=[_TASKS_DIR / folder for folder in sorted(folders)]
    )
    if name not in manager.all_tasks:
        manager = TaskManager()
    if name not in manager.all_tasks:
        raise unknown_name("task", name, [*CATALOG, *manager.all_tasks], "--tasks")
    return manager


def _local_task(request: TaskRequest, config: dict[str, Any] | None) -> ConfigurableTask:
    if config is None:
        raise UsageError(
            f"--task-data {request.name}: '{request.name}' is a group of tasks",
            "name one of its tasks instead",
        )
    documents = _documents(request)
    elsewhere = ("tag", "group", "dataset_path", "dataset_name", "dataset_kwargs")
    local = {key: value for key, value in config.items() if key not in elsewhere}
    fewshot = dict(local.get("fewshot_config") or {})
    if fewshot:
        local["fewshot_config"] = {k: v for k, v in fewshot.items() if k != "split"}
    splits = {"test": documents["test"]}
    if "train" in documents:
        # Examples are drawn as from the hub's copy only if the splits keep their roles and names.
        held_out = config.get("test_split") or config.get("validation_split") or "test"
        shown = config.get("training_split") or "train"
        splits = {held_out: documents["test"], shown: documents["train"]}
        local["validation_split"] = None if config.get("test_split") else held_out
        local["training_split"] = shown
        if config.get("fewshot_split") is not None or not config.get("training_split"):
            local["fewshot_split"] = shown
    else:
        local |= {"test_split": "test", "validation_split": None, "training_split": None}
        if not fewshot.get("samples"):
            # lm-eval leaves the asked document out of its own examples if they are of this split.
            local["fewshot_split"] = "test"
    local["custom_dataset"] = lambda **_: datasets.DatasetDict(splits)
    with _layout_errors(request):
        task = ConfigurableTask(config=local)
        _check_labels(task, request)
    return task


def _check_labels(task: ConfigurableTask, request: TaskRequest) -> None:
    """Each document's right answer is one of its choices; lm-eval would count it as wrong.

    Raises:
        LoramError: Names the first document where it is not.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, document in enumerate(task.eval_docs, 1):
        choices = task.doc_to_choice(document)
        of_document = task.doc_to_text if task.multiple_input else task.doc_to_target
        right = of_document(document)
        for label in right if isinstance(right, list) else [right]:
            known = 0 <= label < len(choices) if isinstance(label, int) else label in choices
            if not known:
                raise LoramError(
                    f"--task-data {request.name}: {request.documents}, document {number}: "
                    f"the label {label!r} is none of its {len(choices)} choices",
                    "correct it, or leave the document out",
                )


def _local_python_task(request: TaskRequest, manager: TaskManager) -> Any:
    """A task that is a class: whatever split it asks its data set for holds our documents."""
    documents = _documents(request)

    class AnySplit(dict[str, Any]):
        """All splits but the training one are the documents."""

        def __missing__(self, split: str) -> datasets.Dataset:
            return documents["train"] if split == "train" in documents else documents["test"]

        def __contains__(self, split: object) -> bool:
            return True

    before = datasets.load_dataset
    datasets.load_dataset = lambda *_, **__: AnySplit()
    try:
        with _layout_errors(request):
            return manager.load([request.lm_eval_name])
    finally:
        datasets.load_dataset = before


@contextlib.contextmanager
def _layout_errors(request: TaskRequest) -> Iterator[None]:
    try:
        yield
    except LoramError:
        raise
    except Exception as error:
        raise LoramError(
            f"--task-data {request.name}: {request.documents} does not have the layout of task "
            f"'{request.lm_eval_name}' ({type(error).__name__}: {_one_line(error)})"
        ) from error


def _documents(request: TaskRequest) -> datasets.DatasetDict:
    splits = {}
    train = "" if request.train_file is None else str(request.train_file)
    for split, path in (("test", request.documents), ("train", train)):
        if not path:
            continue
        flag = request.name if split == "test" else f"{request.name}:{split}"
        records = task_documents(path, request.lm_eval_name, flag)
        try:
            splits[split] = datasets.Dataset.from_list(records)
        except Exception as error:  # pyarrow's own kinds
            raise LoramError(
                f"--task-data {flag}: {path}: fields change their type between records "
                f"({_one_line(error)})"
            ) from error
    return datasets.DatasetDict(splits)


def _hub_tasks(
    request: TaskRequest, config: dict[str, Any] | None, manager: TaskManager | None
) -> Any:
    name = request.lm_eval_name
    with offline_libraries(not hub_reachable()):
        try:
            if manager is None:
                config = {k: v for k, v in (config or {}).items() if k != "tag"}
                return {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}}
            return manager.load([name])
        except LoramError:
            raise
        except Exception as error:
            raise LoramError(
                f"{request.name}: cannot get its data ({type(error).__name__}: {_one_line(error)})",
                f"give it in the data set's own layout: --task-data {request.name}=FILE",
            ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


@contextlib.contextmanager
def _metrics_of_the_hub() -> Iterator[None]:
    """Let tasks be imported that fetch their metric from the hub as they are imported.

    The metric is fetched when it is first used instead, where failing names it.
    """
    import evaluate

    before = evaluate.load

    class Late:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._arguments, self._options = arguments, options

        def compute(self, *arguments: Any, **options: Any) -> Any:
            if self._arguments[:1] == ("code_eval",):
                return ({}, {})  # tried once at import; such tasks are refused before they run
            try:
                with offline_libraries(not hub_reachable()):
                    metric = before(*self._arguments, **self._options)
            except Exception as error:
                raise LoramError(
                    f"the metric '{self._arguments[0]}' comes from the hub, which did not give it "
                    f"({type(error).__name__})",
                    "leave the task out, or try again with a network",
                ) from error
            return metric.compute(*arguments, **options)

    evaluate.load = Late
    try:
        yield
    finally:
        evaluate.load = before
