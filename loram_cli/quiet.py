"""The one place where libraries are kept quiet: only the Reporter speaks to the user.

A silenced message may be the only trace of a check that a library makes. Each function says which
checks it silences, and where loram makes them itself.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any, Literal

_TRAINING = (
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "transformers", "trl",
)  # fmt: skip
_EVALUATION = ("lm_eval", "datasets", "transformers", "huggingface_hub")
# The modules of lm-eval that draw bars, and no setting of it that stops them.
_DRAWING = (
    "lm_eval.api.task",
    "lm_eval.api.model",
    "lm_eval.models.huggingface",
    "lm_eval.models.vllm_causallms",
    "tqdm",  # imported where it is used, by the bootstrap
)


def quiet_process() -> None:
    """Silence libraries for as long as the process lives; to be called before they are imported.

    Everything goes that a library tells by logging or by :mod:`warnings`, unless ``LORAM_DEBUG``
    is set: what :func:`quiet_libraries` and :func:`quiet_lm_eval` list, and Python's own
    deprecations, which say nothing about the user's input.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    if not os.environ.get("LORAM_DEBUG"):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
        warnings.simplefilter("ignore")
        for name in (*_TRAINING, "torch"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the log lines of the training libraries while the block runs.

    Checks silenced with them, and where loram makes them:

    - transformers: tensors that are missing, misshapen or unexpected: ``modeling.load``, and
      ``export.gguf_import`` for GGUF; the readers of single tensors compare name and shape with
      the config.
    - transformers: more tokens than the model has positions: ``training.loop.loop``;
      ``evaluation.harness`` for prompts.
    - PEFT: LoRA on a tied head: ``arch.targets``.
    - TRL: a tokenized prompt that does not begin its tokenized text: ``training.data.tokens``
      compares the two token by token.

    - transformers: what is odd in a config (rotary settings, special tokens beyond the vocabulary,
      a tied head stored with values of its own): ``checkpoint.oddities``, and what cannot be at
      all: ``checkpoint.config_values``.
    - torch: a GPU that it cannot use: ``modeling.load.warn_of_unused_gpu``.

    - transformers: a tokenizer whose pattern splits words wrongly: ``checkpoint.oddities``;
      special tokens that it adds beyond the embedding: ``checkpoint.tokenizer_files``.

    Nothing takes over that a SentencePiece model converted while loading may lack byte fallback,
    and that ``clean_up_tokenization_spaces`` is ignored for BPE.
    """
    with _loggers_silenced(_TRAINING):
        yield


@contextmanager
def no_progress_bars(
    library: Literal["transformers", "datasets"] = "transformers",
) -> Iterator[None]:
    """Keep a library from drawing bars while it reads or writes; nothing is checked by them."""
    if library == "datasets":
        import datasets

        drawn = not datasets.are_progress_bars_disabled()
        off, on = datasets.disable_progress_bars, datasets.enable_progress_bars
    else:
        from transformers.utils import logging as theirs

        drawn = theirs.is_progress_bar_enabled()
        off, on = theirs.disable_progress_bar, theirs.enable_progress_bar
    off()
    try:
        yield
    finally:
        if drawn:
            on()


@contextmanager
def quiet_gguf() -> Iterator[None]:
    """Keep transformers' GGUF reader from drawing its bar, which no switch of its own turns off.

    Nothing is checked by it. Errors are exceptions and pass.
    """
    with redirect_stderr(StringIO()):
        yield


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Silence what a library in Rust writes of a panic, past Python's own standard error.

    Nothing is checked by it: the panic is an exception as well. To be used where nothing else
    writes.
    """
    sys.stderr.flush()
    try:
        before = os.dup(2)
    except OSError:
        yield
        return
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.close(nothing)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence log lines, prints, bars and warnings of lm-eval while the block runs.

    Checks silenced with them, and where loram makes them: prompts and choices that lose their
    start (``evaluation.harness``), and labels that are none of a document's choices
    (``evaluation.lmeval``, for data of the user's own).
    """
    with ExitStack() as stack:
        for name in _DRAWING:
            module: Any = sys.modules.get(name)
            if module is not None and hasattr(module, "tqdm"):
                stack.callback(setattr, module, "tqdm", module.tqdm)
                module.tqdm = partial(module.tqdm, disable=True)
        # It prints what it bootstraps, and tasks of it print as they please.
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(_loggers_silenced(_EVALUATION))
        stack.enter_context(no_progress_bars("datasets"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Silence TRL's use of names that transformers has renamed; nothing of the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield


@contextmanager
def _loggers_silenced(names: tuple[str, ...]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
