"""Batched generation with stops of each row's own.

In place of ``generate``: that runs until the last row has ended and pays for every ended row
on the way. Here ended rows leave the batch, keys and values with them; rows may differ in their
stops, lengths and temperature; and a sampled row draws from a stream of its own, so that its text
does not depend on which rows it shares a batch with.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loram_cli.evaluation.scoring import refuse_nan

# Rows leave when at least a quarter has ended: dropping them copies the others' keys and values.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Generation:
    """One text to generate.

    Attributes:
        prompt: What is given.
        stops: Texts that end it; neither they nor what follows is part of the result.
        max_new_tokens: Tokens at most.
        temperature: 0 takes the likeliest token each time.
        top_p: Smallest share of probability to draw from.
        top_k: Number of tokens to draw from; 0 for all.
        seed: Of the row's own stream.
    """

    prompt: str
    stops: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Decoded:
    """One text that was generated.

    Attributes:
        text: Cut before its first stop.
        tokens: How many were generated; those of a stop and behind it count.
        cut: Whether it reached ``max_new_tokens`` before an end or a stop.
    """

    text: str
    tokens: int
    cut: bool


def stream_seed(seed: int, prompt: str, occurrence: int) -> int:
    """A seed for one of several texts of the same prompt."""
    digest = hashlib.sha256(f"{seed}:{occurrence}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:7])


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the tokenizer's and those of the generation config."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


@dataclass
class _Row:
    job: Generation
    place: int
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    cut: bool = False


class Decoder:
    """Generates with one model and tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._ends = end_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else next(iter(self._ends), 0)
        self._pieces: dict[int, str] = {}

    def generate(
        self,
        prompts: Sequence[list[int]],
        jobs: Sequence[Generation],
        on_token: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Only the texts; see :meth:`decode`."""
        return [decoded.text for decoded in self.decode(prompts, jobs, on_token)]

    def decode(
        self,
        prompts: Sequence[list[int]],
        jobs: Sequence[Generation],
        on_token: Callable[[], None] = lambda: None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Decoded]:
        """The texts, cut before their first stop.

        Args:
            prompts: Token ids of each job's prompt, within the context less what is generated.
            jobs: As many.
            on_token: Called after each pass, which gives every row a token.
            on_text: Called with a job's place and its text so far, after each of its tokens. The
                end may change: a character of several tokens, or a stop that has begun.
        """
        from transformers import DynamicCache

        device = self._model.device
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = torch.tensor(prompt)
            mask[place, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        rows = [_Row(job, place, self._stream(job)) for place, job in enumerate(jobs)]
        done = [Decoded("", 0, cut=False)] * len(jobs)
        cache = DynamicCache(config=self._model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            while rows:
                logits = self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                refuse_nan(logits, self._model)
                on_token()
                # An ended row that has not left yet goes along; what it says is not read.
                chosen = self._choose(logits, rows)
                for row, token in zip(rows, chosen.tolist(), strict=True):
                    if row.place < 0:
                        continue
                    ended = self._take(row, token)
                    if on_text is not None:
                        on_text(row.place, self._text(row))
                    if ended:
                        done[row.place] = Decoded(self._text(row), len(row.ids), row.cut)
                        row.place = -1
                alive = [i for i, row in enumerate(rows) if row.place >= 0]
                if not alive:
                    break
                if len(alive) <= _COMPACT_BELOW * len(rows):
                    index = torch.tensor(alive, device=device)
                    cache.batch_select_indices(index)
                    rows = [rows[i] for i in alive]
                    chosen, mask, positions = chosen[index], mask[index], positions[index]
                ids = chosen[:, None]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                positions = positions[:, -1:] + 1
        return done

    def _stream(self, job: Generation) -> torch.Generator | None:
        if job.temperature <= 0:
            return None
        return torch.Generator(self._model.device).manual_seed(job.seed)

    def _choose(self, logits: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
        """The next token of every row, shape (rows,)."""
        chosen = logits.argmax(-1)
        for i, row in enumerate(rows):
            if row.generator is None or row.place < 0:
                continue
            kept = _filtered(logits[i].float() / row.job.temperature, row.job)
            # The largest of log-probabilities plus Gumbel noise is a draw from their softmax.
            noise = torch.rand(kept.shape, generator=row.generator, device=kept.device)
            chosen[i] = (kept - (-noise.clamp(min=1e-20).log()).log()).argmax()
        return chosen

    def _take(self, row: _Row, token: int) -> bool:
        """Add a token to the row; whether the row ends with it."""
        if token in self._ends:
            return True
        row.ids.append(token)
        if self._met_stop(row, token):
            return True
        row.cut = len(row.ids) >= row.job.max_new_tokens
        return row.cut

    def _met_stop(self, row: _Row, token: int) -> bool:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._tokenizer.decode([token])
        stops = [stop for stop in row.job.stops if stop and _may_end(piece, stop[-1])]
        if not stops:
            return False
        # Another tokenization of the same text may take more tokens, a character each at most.
        tail = self._decode(row.ids[-(max(map(len, stops)) + 2) :])
        return any(stop in tail for stop in stops)

    def _text(self, row: _Row) -> str:
        text = self._decode(row.ids)
        for stop in row.job.stops:
            if stop:
                text = text.split(stop)[0]
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _may_end(piece: str, last: str) -> bool:
    # A token may hold part of a character; and some tokenizers drop a lone token's space.
    return last in piece or "\ufffd" in piece or last.isspace() or not piece


def _filtered(logits: torch.Tensor, job: Generation) -> torch.Tensor:
    """Logits with all but the tokens to draw from at minus infinity, shape (vocabulary,)."""
    if job.top_k > 0:
        smallest = logits.topk(min(job.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if job.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.clone()
        logits[order[before >= job.top_p]] = -torch.inf
    return logits
