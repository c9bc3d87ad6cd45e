"""What lm-eval's tasks talk to: kept answers first, then the model, batch by batch."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from loram_cli.evaluation.decode import Generation, stream_seed
from loram_cli.evaluation.responses import ResponseCache, response_key
from loram_cli.evaluation.scoring import SpanScore, TokenSpan
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.templates import template_text

# Whole batches of answers, each with the place of its question.
Batches = Iterator[Sequence[tuple[int, Any]]]


class Backend(Protocol):
    """A model that generates and scores, batch by batch."""

    def generate(self, jobs: Sequence[Generation]) -> Batches:
        """Texts."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> Batches:
        """(log-probability, whether greedy) of each (context, continuation)."""

    def rolling(self, texts: Sequence[str]) -> Batches:
        """Log-probability of each whole text."""

    def score(self, spans: Sequence[TokenSpan]) -> Batches:
        """:class:`.scoring.SpanScore` of each span."""


class Engine(LM):
    """One row of a comparison; its model is loaded when the first answer is not at hand."""

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        tokenizer: Any,
        context_tokens: int,
        cache: ResponseCache | None = None,
        seed: int = 1234,
        *,
        chat: bool = False,
    ) -> None:
        super().__init__()
        self.chat = chat
        self._open_backend = open_backend
        self._backend: Backend | None = None
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self._cache = cache or ResponseCache()
        self._seed = seed
        self._reporter: Reporter = NullReporter()
        self._label = ""

    def report_to(self, reporter: Reporter, label: str) -> None:
        """Where progress goes from here on, and under which name."""
        self._reporter, self._label = reporter, label

    @property
    def tokenizer_name(self) -> str:
        """lm-eval's name for what it would cache rendered prompts under; it caches none here."""
        return str(getattr(self.tokenizer, "name_or_path", ""))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, which lm-eval writes into its results."""
        return template_text(self.tokenizer)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A task's question, with its solved examples as turns, as the template writes it.

        A system message that the template refuses goes before the first question. Without a begun
        turn the last message is the beginning of the answer, and stays open.

        Raises:
            TemplateRefusal: The template does not take the conversation.
        """
        return Chat(self.tokenizer).asked(chat_history, begun=add_generation_prompt)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's requests for texts; the same one asked several times is sampled anew."""
        seen: Counter[str] = Counter()
        jobs = []
        for request in requests:
            prompt, kwargs = request.args
            occurrence = seen[prompt]
            seen[prompt] += 1
            jobs.append(generation(prompt, kwargs, self._seed, occurrence))
        return self.generate(jobs)

    def generate(self, jobs: Sequence[Generation]) -> list[str]:
        """Texts of all jobs."""
        keys = [
            response_key(
                "text", self.context_tokens, j.prompt, j.stops, j.max_new_tokens, j.temperature,
                *((j.top_p, j.top_k, j.seed) if j.temperature else ()),
            )
            for j in jobs
        ]  # fmt: skip
        return self._answer(keys, jobs, lambda b, jobs: b.generate(jobs), "text")

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """lm-eval's requests for log-likelihoods."""
        pairs = [tuple(request.args) for request in requests]
        keys = [response_key("loglikelihood", self.context_tokens, *pair) for pair in pairs]
        found = self._answer(keys, pairs, lambda b, pairs: b.loglikelihood(pairs), "request")
        return [(logprob, greedy) for logprob, greedy in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """lm-eval's requests for log-likelihoods of whole texts."""
        texts = [request.args[0] for request in requests]
        keys = [response_key("rolling", self.context_tokens, text) for text in texts]
        return self._answer(keys, texts, lambda b, texts: b.rolling(texts), "request")

    def score(self, spans: Sequence[TokenSpan]) -> list[SpanScore]:
        """Scores of token spans."""
        keys = [response_key("span", span.ids, span.start) for span in spans]

        def ask(backend: Backend, spans: Sequence[TokenSpan]) -> Batches:
            for batch in backend.score(spans):
                yield [(place, [s.logprob, s.tokens, s.greedy]) for place, s in batch]

        return [SpanScore(*answer) for answer in self._answer(keys, spans, ask, "record")]

    def _answer(
        self,
        keys: list[str],
        questions: Sequence[Any],
        ask: Callable[[Backend, Sequence[Any]], Batches],
        unit: str,
    ) -> list[Any]:
        # The same question twice in one call is one question.
        places: dict[str, int] = {}
        for place, key in enumerate(keys):
            if self._cache.get(key) is None:
                places.setdefault(key, place)
        missing = list(places.items())
        with self._reporter.progress(self._label, len(keys), unit) as progress:
            progress.skip(len(keys) - len(missing))
            if missing:
                if self._backend is None:
                    self._backend = self._open_backend()
                for batch in ask(self._backend, [questions[place] for _, place in missing]):
                    self._cache.put({missing[index][0]: answer for index, answer in batch})
                    progress.advance(len(batch))
        return [self._cache.get(key) for key in keys]


def generation(prompt: str, kwargs: dict[str, Any], seed: int, occurrence: int) -> Generation:
    """lm-eval's generation arguments as one of our jobs."""
    plain = normalize_gen_kwargs(kwargs)
    if plain.get("do_sample") and "temperature" not in kwargs:
        plain["temperature"] = 1.0  # what Hugging Face samples with when nothing is said
    sampled = bool(plain.get("do_sample")) and float(plain["temperature"]) > 0
    until = plain.get("until") or []
    return Generation(
        prompt,
        tuple([until] if isinstance(until, str) else until),
        int(plain["max_gen_toks"]),
        float(plain.get("temperature") or 0.0) if sampled else 0.0,
        float(plain.get("top_p") or 1.0) if sampled else 1.0,
        int(plain.get("top_k") or 0) if sampled else 0,
        stream_seed(seed, prompt, occurrence) if sampled else 0,
    )
