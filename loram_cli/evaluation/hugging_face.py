"""The default backend: a Hugging Face model in this process."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.models.huggingface import HFLM

from loram_cli.evaluation.batching import GrowingBatch, bytes_per_token
from loram_cli.evaluation.decode import Decoder, Generation
from loram_cli.evaluation.engine import Batches
from loram_cli.evaluation.perplexity import context_length
from loram_cli.evaluation.scoring import TokenSpan, score_spans


class HuggingFaceBackend:
    """Generates and scores with a model in memory; None rows per pass lets memory choose."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None = None) -> None:
        self._model = model.eval()
        self._batch_size = batch_size
        # lm-eval sets a pad token, and may add one beyond the embedding: give it a copy that
        # has one already. Padded positions are masked, so that any token does.
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        self._context = context_length(model)
        self._encoder = _Encoder(model, tokenizer, self._context)
        self._decoder = Decoder(model, tokenizer)

    def generate(self, jobs: Sequence[Generation]) -> Batches:
        """Longest prompts first; prompts too long for the context lose their start."""
        prompts = [
            self._encoder.tok_encode(
                job.prompt, left_truncate_len=max(1, self._context - job.max_new_tokens)
            )
            for job in jobs
        ]

        def tokens(place: int) -> int:
            return len(prompts[place]) + jobs[place].max_new_tokens

        def work(places: Sequence[int]) -> list[tuple[int, str]]:
            texts = self._decoder.generate([prompts[i] for i in places], [jobs[i] for i in places])
            return list(zip(places, texts, strict=True))

        order = sorted(range(len(jobs)), key=lambda i: (-len(prompts[i]), i))
        return self._batching(scoring=False).run(order, tokens, work)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> Batches:
        """As lm-eval tokenizes, joins and cuts context and continuation."""
        for batch in self.score(self._encoder.spans(pairs)):
            yield [(place, [score.logprob, score.greedy]) for place, score in batch]

    def rolling(self, texts: Sequence[str]) -> Batches:
        """Each text in disjoint windows of the context, after the prefix token."""
        spans, owners = [], []
        for place, text in enumerate(texts):
            for window in utils.get_rolling_token_windows(
                token_list=self._encoder.tok_encode(text),
                prefix_token=self._encoder.prefix_token_id,
                max_seq_len=self._context,
                context_len=1,
            ):
                context, continuation = utils.make_disjoint_window(window)
                spans.append(_span(context, continuation, self._context))
                owners.append(place)
        waiting, sums = Counter(owners), dict.fromkeys(range(len(texts)), 0.0)
        yield [(place, 0.0) for place in sums if place not in waiting]
        for batch in self.score(spans):
            for index, score in batch:
                sums[owners[index]] += score.logprob
                waiting[owners[index]] -= 1
            whole = {owners[index] for index, _ in batch if waiting[owners[index]] == 0}
            yield [(place, sums[place]) for place in sorted(whole)]

    def score(self, spans: Sequence[TokenSpan]) -> Batches:
        """Log-likelihoods of token spans."""
        return score_spans(self._model, spans, self._batching(scoring=True))

    def _batching(self, *, scoring: bool) -> GrowingBatch:
        memory = bytes_per_token(self._model, scoring=scoring)
        return GrowingBatch(self._batch_size, self._model.device, memory)


def _span(context: Sequence[int], continuation: Sequence[int], context_tokens: int) -> TokenSpan:
    ids = [*context, *continuation][-(context_tokens + 1) :]
    return TokenSpan(tuple(ids), max(1, len(ids) - len(continuation)))


class _Encoder(HFLM):
    """lm-eval's own ways with special tokens, borders and empty contexts; it runs no model."""

    def __init__(self, model: Any, tokenizer: Any, context_tokens: int) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=1,
            max_length=context_tokens,
        )

    def spans(self, pairs: Sequence[tuple[str, str]]) -> list[TokenSpan]:
        class Request:
            def __init__(self, pair: tuple[str, str]) -> None:
                self.args = pair

        return self.loglikelihood([Request(pair) for pair in pairs], disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
        return [_span(context, asked, self.max_length) for _, context, asked in requests]
