"""The door to lm-eval: its tasks on local documents, its Hugging Face wrapper, its silence.

Imports lm-eval (about four seconds); :mod:`.harness` imports this module only when it runs.
"""

import contextlib
import copy
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
import transformers
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.humaneval import TASK_CONFIG as HUMANEVAL_CONFIG
from loram_cli.evaluation.perplexity import context_length
from loram_cli.evaluation.requests import TaskRequest, read_records
from loram_cli.hub import hub_reachable, offline_libraries
from loram_cli.reporting import Reporter
from loram_cli.specs import unknown_name

_TASKS_DIR = Path(lm_eval.__file__).parent / "tasks"
_DEFAULT_GENERATED_TOKENS = 256


class LocalModel(HFLM):
    """lm-eval's wrapper around a model in memory, with stops that hold for each row alone."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        # lm-eval sets a pad token, and may add one beyond the embedding: give it a copy that
        # has one already. Padded positions are masked, so that any token does.
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=context_length(model),
        )

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """As the parent's, which goes on until all rows have met the *same* stop sequence."""
        if not kwargs.get("do_sample"):
            kwargs["do_sample"] = False
            kwargs.pop("temperature", None)
        stops = _StopPerRow(self.tokenizer, stop, context.shape[1])
        with torch.inference_mode():
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=transformers.StoppingCriteriaList([stops]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **kwargs,
            )


class _StopPerRow(transformers.StoppingCriteria):
    """Ends a row as soon as its newest text holds any of the stop sequences."""

    def __init__(self, tokenizer: Any, stops: list[str], prompt_tokens: int) -> None:
        self._tokenizer, self._stops, self._prompt_tokens = tokenizer, stops, prompt_tokens
        # Another tokenization of the same text may take more tokens, a character each at most.
        self._tail = max((len(stop) for stop in stops), default=0) + 2
        self._done: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tail = input_ids[:, self._prompt_tokens :][:, -self._tail :].tolist()
        self._done = self._done or [False] * len(tail)
        waiting = [row for row, done in enumerate(self._done) if not done]
        for row in waiting:
            text = self._tokenizer.decode(tail[row])
            self._done[row] = any(stop in text for stop in self._stops)
        return torch.tensor(self._done, device=input_ids.device)


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
        LoramError: The documents cannot be had.
    """
    config, manager = _find(request.name)
    if request.data_file is not None:
        loaded = {"tasks": {request.name: _local_task(request, config)}, "groups": {}}
    else:
        loaded = _hub_tasks(request.name, config, manager)
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        wanted = default or 0
        # As lm-eval has it: a task whose own config says zero takes no examples at all.
        if default != 0 and (request.num_fewshot is not None or request.bundled):
            wanted = request.num_fewshot or 0
        pool = len(task.sampler.df) if wanted else 0
        own = int(task.fewshot_cfg.split == task.config.test_split)
        if wanted and wanted > pool - own:
            raise UsageError(
                f"{request.name}: {wanted} few-shot examples are wanted and {pool - own} are there",
                f"ask for fewer, or give a file: --task-data {request.name}:train=FILE",
            )
        task.set_config("num_fewshot", wanted)
        task.set_fewshot_seed(seed)
        if task.OUTPUT_TYPE == "generate_until":
            kwargs = task.config.generation_kwargs
            own_cap = int(kwargs.get("max_gen_toks") or _DEFAULT_GENERATED_TOKENS)
            kwargs["max_gen_toks"] = max(1, min(max_new_tokens or own_cap, own_cap, context // 2))
    return loaded


def _find(name: str) -> tuple[dict[str, Any] | None, TaskManager | None]:
    """The task's config (None for a group, a tag or a task written in Python), and its manager."""
    if name == "humaneval":
        return copy.deepcopy(HUMANEVAL_CONFIG), None
    if name == "gsm8k":
        return load_yaml(_TASKS_DIR / "gsm8k" / "gsm8k.yaml", resolve_func=True), None
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
        raise unknown_name("task", name, ["gsm8k", "humaneval", *manager.all_tasks], "--tasks")
    entry = manager.task_index[name]
    if entry.kind.name != "TASK" or entry.yaml_path is None:
        return None, manager
    return load_yaml(entry.yaml_path, resolve_func=True), manager


def _local_task(request: TaskRequest, config: dict[str, Any] | None) -> ConfigurableTask:
    name, data_file = request.name, request.data_file
    if config is None or data_file is None:
        raise UsageError(
            f"--task-data {name}: '{name}' is a group or fetches its own data",
            "name one of its tasks instead",
        )
    splits = {"test": _dataset(data_file, name)}
    if request.train_file is not None:
        splits["train"] = _dataset(request.train_file, name)
    documents = datasets.DatasetDict(splits)
    elsewhere = ("tag", "group", "dataset_path", "dataset_name", "dataset_kwargs")
    local = {key: value for key, value in config.items() if key not in elsewhere}
    if isinstance(local.get("fewshot_config"), dict):
        local["fewshot_config"] = {
            key: value for key, value in local["fewshot_config"].items() if key != "split"
        }
    local |= {
        "custom_dataset": lambda **_: documents,
        # lm-eval leaves the asked document out of its own examples under this split name alone.
        "test_split": "test",
        "validation_split": None,
        "training_split": "train" if "train" in splits else None,
        "fewshot_split": "train" if "train" in splits else "test",
    }
    try:
        return ConfigurableTask(config=local)
    except Exception as error:
        raise LoramError(
            f"--task-data {name}: {data_file} does not have the layout of task '{name}' "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error


def _dataset(path: Path, task: str) -> datasets.Dataset:
    records = read_records(path, task)
    try:
        return datasets.Dataset.from_list(records)
    except Exception as error:  # pyarrow's own kinds
        raise LoramError(
            f"--task-data {task}: {path}: fields change their type between records "
            f"({_one_line(error)})"
        ) from error


def _hub_tasks(name: str, config: dict[str, Any] | None, manager: TaskManager | None) -> Any:
    with offline_libraries(not hub_reachable()):
        try:
            if manager is None:
                config = {k: v for k, v in (config or {}).items() if k != "tag"}
                return {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}}
            return manager.load([name])
        except Exception as error:
            raise LoramError(
                f"{name}: its data cannot be had ({type(error).__name__}: {_one_line(error)})",
                f"give it in the data set's own layout: --task-data {name}=FILE",
            ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


@contextlib.contextmanager
def quiet(reporter: Reporter, labels: Mapping[str, str]) -> Iterator[None]:
    """Keep lm-eval's log lines and bars off the terminal; its progress goes to the reporter.

    Args:
        reporter: Receives one progress per kind of request.
        labels: ``task``: the name to show.
    """
    with contextlib.ExitStack() as stack:

        class Bar:
            """Stands in for tqdm in the two lm-eval modules that draw."""

            def __init__(
                self, iterable: Any = None, total: int | None = None, desc: str = "", **_: Any
            ) -> None:
                self._iterable, self._stack = iterable, contextlib.ExitStack()
                stack.push(self._stack)
                self._progress = None
                if desc:  # "Running generate_until requests"; building contexts has none
                    context = reporter.progress(labels["task"], total, "request")
                    self._progress = self._stack.enter_context(context)

            def __iter__(self) -> Iterator[Any]:
                return iter(self._iterable)

            def update(self, steps: int = 1) -> None:
                if self._progress is not None:
                    self._progress.advance(steps)

            def close(self) -> None:
                self._stack.close()

        for module in (lm_eval.api.task, lm_eval.models.huggingface):
            stack.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = Bar
        for name in ("lm_eval", "datasets", "transformers", "huggingface_hub"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if not datasets.utils.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python and torch for sampling tasks; give the caller's states back afterwards."""
    state = random.getstate()
    with torch.random.fork_rng():
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
