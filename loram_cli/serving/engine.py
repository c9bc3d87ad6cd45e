"""Rows of models, loaded once and asked one request at a time."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.evaluation.decode import Decoded, Decoder, Generation
from loram_cli.evaluation.models import opened_model, row_tokenizer
from loram_cli.evaluation.perplexity import context_length
from loram_cli.modeling.load import warn_of_unused_gpu
from loram_cli.reporting import Reporter
from loram_cli.stages.evaluate.generate import asking_layout, learnt_layout
from loram_cli.stages.evaluate.rows import checked_models
from loram_cli.stages.evaluate.spec import AnswersSpec
from loram_cli.training.adapters import with_adapter
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.conversations import Message
from loram_cli.training.data.layouts import Layout, continued
from loram_cli.training.data.templates import TemplateRefusal
from loram_cli.training.data.tokens import encode_prompt

# In-flight work gets so long to notice that the engine closes.
_CLOSING_SECONDS = 10.0


class PromptTooLongError(LoramError):
    """A prompt fills the context."""


class EngineBusyError(LoramError):
    """As many requests wait as may."""


class EngineClosedError(LoramError):
    """It closes, and gives no more answers."""


class AnswerTimeoutError(LoramError):
    """An answer took longer than it may."""


@dataclass(frozen=True)
class ServedRow:
    """One row, loaded.

    Attributes:
        label: Its name.
        loaded: The model, which may be other rows' as well.
        adapter: Which of the model's adapters acts; None for none.
        tokenizer: Its tokenizer.
        layout: How a conversation is put to it.
        learnt: Whether it learnt from examples of that layout.
        context_tokens: Prompt and answer together at most.
    """

    label: str
    loaded: Any
    adapter: str | None
    tokenizer: Any
    layout: Layout
    learnt: bool
    context_tokens: int

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to go on with.

        Raises:
            LoramError: The last message is not the user's, or the chat template refuses it.
        """
        chat = Chat(self.tokenizer)
        example = continued(messages, self.layout, chat, learnt=self.learnt)
        ids = encode_prompt(example.prompt, self.tokenizer, special_tokens=example.special_tokens)
        return self._within_context(ids)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a prompt as it is.

        Raises:
            LoramError: It fills the context.
        """
        return self._within_context(encode_prompt(text, self.tokenizer))

    def _within_context(self, ids: list[int]) -> list[int]:
        if not ids:
            raise LoramError("the prompt is empty", "send some text")
        if len(ids) >= self.context_tokens:
            raise PromptTooLongError(
                f"a prompt of {len(ids)} tokens leaves no room in {self.label}'s context of "
                f"{self.context_tokens}",
                "shorten it, or begin anew",
            )
        return ids


class ServingEngine:
    """Answers by the rows' names; rows of one base share its weights.

    Args:
        rows: By name.
        queue: Requests that may wait for the one that runs.
        seconds: Time for one answer; None for as long as it takes.
    """

    def __init__(
        self, rows: dict[str, ServedRow], *, queue: int = 0, seconds: float | None = None
    ) -> None:
        self.rows = rows
        self._decoders = {label: Decoder(r.loaded, r.tokenizer) for label, r in rows.items()}
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(queue + 1)
        self._closing = threading.Event()
        self._seconds = seconds

    def answer(
        self,
        label: str,
        prompts: Sequence[list[int]],
        jobs: Sequence[Generation],
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Decoded]:
        """What a row answers; waits for its turn.

        Args:
            label: The row.
            prompts: Token ids, within the context.
            jobs: As many; none gets more tokens than the context holds.
            on_text: As of :meth:`.Decoder.decode`; what it raises ends the work.

        Raises:
            EngineBusyError: Too many requests wait.
            AnswerTimeoutError: The time for one answer is up.
            EngineClosedError: It closes.
        """
        if not self._places.acquire(blocking=False):
            raise EngineBusyError("too many requests are waiting", "try again later")
        try:
            with self._turn, with_adapter(self.rows[label].loaded, self.rows[label].adapter):
                return self._decoders[label].decode(prompts, jobs, self._watch(), on_text)
        finally:
            self._places.release()

    def close(self) -> None:
        """End what runs, at its next token, and answer nothing any more."""
        self._closing.set()
        if self._turn.acquire(timeout=_CLOSING_SECONDS):
            self._turn.release()

    def _watch(self) -> Callable[[], None]:
        until = None if self._seconds is None else time.monotonic() + self._seconds

        def watch() -> None:
            if self._closing.is_set():
                raise EngineClosedError("the server is closing")
            if until is not None and time.monotonic() > until:
                raise AnswerTimeoutError(
                    f"no answer within {self._seconds:g} s",
                    "ask for fewer tokens, or start with a higher --request-seconds",
                )

        watch()
        return watch


@contextmanager
def opened_rows(spec: AnswersSpec, reporter: Reporter) -> Iterator[dict[str, ServedRow]]:
    """Every row of a spec, loaded for the length of the block; one base is loaded once.

    Args:
        spec: Rows of one adapter at most each, and how to load them.
        reporter: Told what is loaded, and warned where not all of it is in memory.

    Raises:
        LoramError: A row is not whole, does not fit, or has no tokenizer.
    """
    warn_of_unused_gpu(spec.device, reporter)
    models = checked_models(spec.rows, reporter)
    adapters: dict[Path, dict[str, Path]] = {}
    names: dict[str, str | None] = {}
    for place, (label, parts) in enumerate(spec.rows.items()):
        own = adapters.setdefault(parts[0], {})
        names[label] = f"row{place}" if parts[1:] else None
        if parts[1:]:
            own[f"row{place}"] = parts[1]
    learnt = learnt_layout(spec)
    with ExitStack() as stack:
        loaded: dict[Path, Any] = {}
        for base, model in models.items():
            labels = [label for label, parts in spec.rows.items() if parts[0] == base]
            reporter.note(f"loading {', '.join(labels)} ({base})")
            loaded[base] = stack.enter_context(
                opened_model(
                    ", ".join(labels), model, adapters[base], reporter, device=spec.device,
                    nf4=spec.quantize is not None, weights_memory=spec.weights_memory,
                )
            )  # fmt: skip
        rows = {}
        for label, parts in spec.rows.items():
            tokenizer = row_tokenizer(parts, spec.model)
            layout = asking_layout(spec, tokenizer, learnt)
            rows[label] = ServedRow(
                label, loaded[parts[0]], names[label], tokenizer, layout, layout == learnt,
                context_length(loaded[parts[0]]),
            )  # fmt: skip
            _try_template(rows[label], reporter)
        yield rows


def _try_template(row: ServedRow, reporter: Reporter) -> None:
    """Render a message, and say so where that fails: no request of a conversation will succeed."""
    if row.layout != "messages":
        return
    try:
        row.chat_ids([{"role": "user", "content": "Hello"}])
    except TemplateRefusal as error:
        reporter.warn(f"row {row.label}: {error.message}")
