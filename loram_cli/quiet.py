"""Keeps libraries' advisory lines off the terminal: only the Reporter speaks to the user."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# bitsandbytes reports a missing optional CPU kernel whenever anything imports it, peft included.
_LOGGERS = (
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "transformers", "trl",
)  # fmt: skip


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Raise the level of the training libraries' loggers to errors while the block runs."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars while it writes or reads weights."""
    from transformers.utils import logging as hf_logging

    were_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            hf_logging.enable_progress_bar()
