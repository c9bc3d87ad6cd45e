"""Generate: what the models of a run answer to a prompt."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import Reporter
from loram_cli.stages.core.lineage import trained_layout
from loram_cli.stages.evaluate.models import (
    check_row,
    opened_model,
    parse_weights_memory,
    row_tokenizer,
)
from loram_cli.training.data.layouts import Layout


@dataclass(frozen=True, kw_only=True)
class GenerateSpec:
    """What to ask, and whom.

    Attributes:
        model: The original base.
        rows: Per row its model's directory and, if any, the adapter's.
        prompts: Texts to ask.
        layout: How a text becomes a prompt, as in training data: ``question``, ``instruction``,
            ``messages`` by the chat template, or ``prompt`` as it is. None takes what the first
            adapter was trained on, for every row alike; without one it is messages where the
            tokenizer has a chat template.
        max_new_tokens: Tokens at most.
        temperature: 0 takes the likeliest token each time.
        top_p: Smallest share of probability to draw from.
        stop: Texts that end an answer, besides the end-of-sequence token.
        quantize: ``nf4`` holds the decoder linears in 4 bits.
        weights_memory: Memory for weights on the device, in bytes or as text such as ``20GiB``;
            layers beyond it are read anew for every token. None takes most of what is free.
        seed: Of drawn tokens.
        device: Where to run; a GPU when there is one.
    """

    model: Path
    rows: dict[str, tuple[Path, ...]]
    prompts: tuple[str, ...]
    layout: Layout | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    quantize: Literal["nf4"] | None = None
    weights_memory: int | str | None = None
    seed: int = 1234
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise UsageError("no model to ask", "pass --rows base")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UsageError("the prompt is empty", "write it behind the command, or pipe it in")
        if self.max_new_tokens < 1:
            raise UsageError("--max-new-tokens must be above 0")
        try:
            "".join(self.prompts).encode()
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is not UTF-8", "convert it to UTF-8") from error
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature:g} is no number from 0 on")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g} is outside (0, 1]")
        if self.top_p < 1 and not self.temperature:
            raise UsageError("--top-p is for drawn tokens", "pass --temperature as well")
        parse_weights_memory(self)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a row wrote.

    Attributes:
        row: Its name.
        prompt: As it was asked for.
        rendered: What the model was given.
        text: What it wrote.
    """

    row: str
    prompt: str
    rendered: str
    text: str

    def to_mapping(self) -> dict[str, str]:
        """Plain form for ``--json``."""
        return asdict(self)


def run(spec: GenerateSpec, reporter: Reporter) -> list[Answer]:
    """Ask every row every prompt; rows are loaded one after another.

    Raises:
        LoramError: A model or an adapter is not whole or does not fit, or a prompt is too long.
    """
    for parts in spec.rows.values():
        check_row(parts)
    known = (trained_layout(parts[-1]) for parts in spec.rows.values())
    learnt = next(filter(None, known), None)
    return [answer for label in spec.rows for answer in _ask(spec, label, learnt, reporter)]


def _ask(spec: GenerateSpec, label: str, learnt: Layout | None, reporter: Reporter) -> list[Answer]:
    from loram_cli.evaluation.decode import Decoder, Generation, stream_seed
    from loram_cli.evaluation.perplexity import context_length
    from loram_cli.training.data.layouts import Chat, asked

    parts = spec.rows[label]
    tokenizer = row_tokenizer(spec, label)
    layout = spec.layout or learnt
    if layout is None:
        layout = "messages" if getattr(tokenizer, "chat_template", None) else "prompt"
    chat = Chat(tokenizer)
    examples = [asked(prompt, layout, chat, learnt=layout == learnt) for prompt in spec.prompts]
    chat.warn_of_fallback(reporter)
    ids = [
        tokenizer(example.prompt, add_special_tokens=example.special_tokens)["input_ids"]
        for example in examples
    ]
    reporter.note(f"asking {label} ({' + '.join(map(str, parts))}), layout {layout}")
    with opened_model(spec, label, reporter) as model:
        context = context_length(model)
        longest = max(map(len, ids))
        if longest >= context:
            raise LoramError(
                f"a prompt of {longest} tokens leaves no room in {label}'s context of {context}",
                "shorten it",
            )
        jobs = [
            Generation(
                prompt=example.prompt,
                stops=spec.stop,
                max_new_tokens=min(spec.max_new_tokens, context - len(mine)),
                temperature=spec.temperature,
                top_p=spec.top_p,
                seed=stream_seed(spec.seed, example.prompt, place),
            )
            for place, (example, mine) in enumerate(zip(examples, ids, strict=True))
        ]
        most = max(job.max_new_tokens for job in jobs)
        if most < spec.max_new_tokens:
            reporter.note(f"{most} tokens at most: {label}'s context is {context}")
        with reporter.progress(label, most, "token") as progress:
            texts = Decoder(model, tokenizer).generate(ids, jobs, progress.advance)
    return [
        Answer(row=label, prompt=prompt, rendered=example.prompt, text=text.strip())
        for prompt, example, text in zip(spec.prompts, examples, texts, strict=True)
    ]
