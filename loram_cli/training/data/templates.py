"""Chat templates of strangers, run within limits of time and memory."""

import ctypes
import os
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError

# Processor time: a machine that does other work as well is no reason to refuse a template.
MOST_SECONDS = 10.0
MOST_BYTES = 512 << 20
# Text that a template may write beside, and for each character of, what it is given.
_FREE_CHARACTERS = 1 << 20
_MOST_GROWTH = 16
# Of a template's own source; the longest of the known ones has 30 KiB.
MOST_TEMPLATE_BYTES = 1 << 20


class TemplateRefusal(LoramError):
    """A template did not render a conversation: it refused it, failed or took too much.

    Attributes:
        meant: The template itself says no, by ``raise_exception``.
    """

    def __init__(self, message: str, hint: str | None = None, *, meant: bool = False) -> None:
        self.meant = meant
        super().__init__(message, hint)


class _TooLong(Exception):
    """The time is up."""


def template_file(tokenizer: Any) -> str:
    """The file that a tokenizer's template stands in, for errors."""
    given = getattr(tokenizer, "chat_template_source", None)
    if given is not None:
        return f"--chat-template {given}"
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or "the tokenizer"))
    own = folder / "chat_template.jinja"
    if own.is_file():
        return str(own)
    config = folder / "tokenizer_config.json"
    return str(config if config.is_file() else folder)


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    where: str,
    *,
    tools: list[dict[str, Any]] | None = None,
    begun: bool = False,
) -> str:
    """A conversation as the tokenizer's chat template writes it.

    In another thread than the main one, the limit of time is one of the clock, and none of memory
    holds: it would be that of the threads beside it as well.

    Raises:
        TemplateRefusal: The template refuses the conversation, fails, or takes more than
            ``MOST_SECONDS`` or ``MOST_BYTES``; names the template's file.
    """

    def run() -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=begun
            )
        )

    return _within_limits(run, tokenizer, messages, tools, where)


def generation_spans(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    where: str,
    tools: list[dict[str, Any]] | None = None,
) -> tuple[str, list[tuple[int, int]]] | None:
    """The text, and the ranges of characters between ``{% generation %}`` marks.

    Returns:
        None where the template has no such marks.

    Raises:
        TemplateRefusal: As :func:`render`.
    """
    template = template_text(tokenizer, tools)
    if not _marks_generation(template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    spans: list[tuple[int, int]] = []

    def run() -> str:
        [text], [found] = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        spans.extend((begin, end) for begin, end in found)
        return str(text)

    return _within_limits(run, tokenizer, messages, tools, where), spans


def template_text(tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> str:
    """The template's source; of several, the one for conversations with or without tools."""
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return str(template)
    name = "tool_use" if tools is not None and "tool_use" in template else "default"
    return str(template.get(name, ""))


@lru_cache(maxsize=8)
def _marks_generation(template: str) -> bool:
    import re

    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


@lru_cache(maxsize=8)
def _has_power(template: str) -> bool:
    """Whether a template raises a number to a power, which nothing can stop once it runs."""
    import jinja2

    previous = ""
    for _, kind, token in jinja2.Environment().lex(template):
        # Behind an opening bracket or a comma two stars pass keywords on.
        if kind == "operator" and token == "**" and previous not in ("(", ","):
            return True
        if kind != "whitespace":
            previous = token
    return False


def _check_is_one(tokenizer: Any, tools: list[dict[str, Any]] | None) -> None:
    """Refuse what can render no conversation, naming its file and no record.

    Raises:
        TemplateRefusal: It is no text, or none of several is the default.
    """
    given = tokenizer.chat_template
    text = template_text(tokenizer, tools)
    problem = None
    if isinstance(given, dict) and not text:
        known = ", ".join(map(str, given)) or "none"
        problem = f"no chat template is the default one (known: {known})"
    elif not isinstance(given, str | dict):
        problem = f"chat_template is {given!r:.40}, expected text"
    if problem is not None:
        raise _broken(tokenizer, problem)


def _broken(tokenizer: Any, problem: str) -> TemplateRefusal:
    return TemplateRefusal(
        f"{template_file(tokenizer)}: {problem}", "--chat-template gives another one"
    )


def _within_limits(
    run: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    where: str,
) -> str:
    import jinja2

    def refusal(what: str, *, meant: bool = False) -> TemplateRefusal:
        return TemplateRefusal(
            f"{where}: the chat template {what}", template_file(tokenizer), meant=meant
        )

    _check_is_one(tokenizer, tools)
    try:
        if _has_power(template_text(tokenizer, tools)):
            raise refusal("raises numbers to a power (**), which is not allowed")
        with _limits():
            text: str = run()
    except _TooLong:
        raise refusal(f"takes more than {MOST_SECONDS:g} s on it") from None
    except MemoryError:
        raise refusal(f"takes more than {MOST_BYTES >> 20} MiB on it") from None
    except RecursionError:
        raise refusal("calls itself without end") from None
    except LoramError:
        raise
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: the chat template does not parse ({error.message})"
        raise _broken(tokenizer, problem) from error
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        # raise_exception raises the class itself, and mistakes of a template those below it.
        meant = type(error) is jinja2.TemplateError
        raise refusal(f"refuses it ({error})", meant=meant) from error
    except Exception as error:
        # It is a program of a stranger, and may raise anything.
        raise refusal(f"fails on it ({error or type(error).__name__})") from error
    given = len(str(messages)) + len(str(tools))
    if len(text) > _FREE_CHARACTERS + _MOST_GROWTH * given:
        raise refusal(f"makes {len(text)} characters of {given}")
    return text


@contextmanager
def _limits() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        with _timed_thread():
            yield
        return
    with _less_memory(), _timed():
        yield


@contextmanager
def _timed_thread() -> Iterator[None]:
    """Signals reach the main thread only: another one is sent an exception."""
    thread = ctypes.c_ulong(threading.get_ident())
    send = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        send(thread, ctypes.py_object(_TooLong))

    timer = threading.Timer(MOST_SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        send(thread, None)  # what it sent too late


@contextmanager
def _timed() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _less_memory() -> Iterator[None]:
    """A lower limit on this process's address space, where the system has one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + MOST_BYTES
    if soft != resource.RLIM_INFINITY and soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of address space in use; as good as no limit where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (OSError, ValueError):
        return 1 << 62
    return pages * os.sysconf("SC_PAGE_SIZE")
