"""Keeps lm-eval's own lines and bars off the terminal, and the caller's random states intact."""

import contextlib
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import torch

_LOGGERS = ("lm_eval", "datasets", "transformers", "huggingface_hub")
# The modules of lm-eval that draw.
_DRAWING = (
    "lm_eval.api.task",
    "lm_eval.api.model",
    "lm_eval.models.huggingface",
    "lm_eval.models.vllm_causallms",
)


class _NoBar:
    """Stands in for tqdm."""

    def __init__(self, iterable: Any = None, **_: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def update(self, steps: int = 1) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log line, bar or warning of lm-eval and its libraries while the block runs."""
    with contextlib.ExitStack() as stack:
        for name in _DRAWING:
            module = sys.modules.get(name)
            if module is not None and hasattr(module, "tqdm"):
                stack.callback(setattr, module, "tqdm", module.tqdm)
                module.tqdm = _NoBar
        for name in _LOGGERS:
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
    """Seed Python and torch for tasks that draw; give the caller's states back afterwards."""
    state = random.getstate()
    with torch.random.fork_rng():
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
