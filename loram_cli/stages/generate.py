"""Generate: what the models of a run answer to a prompt."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.row_models import open_model

if TYPE_CHECKING:
    from loram_cli.training.layouts import Layout

_LAYOUTS = ("messages", "prompt", "instruction", "question")


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
        weights_memory_bytes: Memory for weights on the device; layers beyond it are read anew for
            every token. None takes most of what is free.
        seed: Of drawn tokens.
        device: Where to run; a GPU when there is one.
    """

    model: Path
    rows: dict[str, tuple[Path, ...]]
    prompts: tuple[str, ...]
    layout: Literal["messages", "prompt", "instruction", "question"] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    quantize: Literal["nf4"] | None = None
    weights_memory_bytes: int | None = None
    seed: int = 1234
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise UsageError("no model to ask", "pass --rows base")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UsageError("the prompt is empty", "write it behind the command, or pipe it in")
        if self.max_new_tokens < 1:
            raise UsageError("--max-new-tokens must be above 0")
        if self.temperature < 0:
            raise UsageError(f"--temperature {self.temperature:g} is below 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g} is outside (0, 1]")
        if self.weights_memory_bytes is not None and self.weights_memory_bytes < 1:
            raise UsageError("--weights-memory must be above 0")


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
    from loram_cli.checkpoint.adapter import read_shapes
    from loram_cli.stages.planning import check_model

    for parts in spec.rows.values():
        check_model(parts[0], tokenizer=False)
        for adapter in parts[1:]:
            read_shapes(adapter)
    layout = spec.layout or next(filter(None, map(trained_layout, spec.rows.values())), None)
    return [answer for label in spec.rows for answer in _ask(spec, label, layout, reporter)]


def trained_layout(parts: Sequence[Path]) -> "Layout | None":
    """The layout of the data that a row's adapter was trained on, as its manifest tells.

    Args:
        parts: The model's directory and, if any, the adapter's.
    """
    if len(parts) < 2 or not (parts[-1] / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.read(parts[-1])
    results = manifest.results
    if manifest.stage == "recover":
        results = results.get("training") or {}
    layout = results.get("layout")
    return layout if layout in _LAYOUTS else None


def _ask(
    spec: GenerateSpec, label: str, layout: "Layout | None", reporter: Reporter
) -> list[Answer]:
    from loram_cli.evaluation.decode import Decoder, Generation, stream_seed
    from loram_cli.evaluation.perplexity import context_length
    from loram_cli.modeling.narrow import load_tokenizer
    from loram_cli.training.layouts import Chat, asked

    parts = spec.rows[label]
    try:
        tokenizer = load_tokenizer(parts[0])
    except LoramError:
        tokenizer = load_tokenizer(spec.model)
    if layout is None:
        layout = "messages" if getattr(tokenizer, "chat_template", None) else "prompt"
    chat = Chat(tokenizer)
    examples = [asked(prompt, layout, chat) for prompt in spec.prompts]
    chat.warn_of_fallback(reporter)
    ids = [
        tokenizer(example.prompt, add_special_tokens=example.special_tokens)["input_ids"]
        for example in examples
    ]
    reporter.note(f"asking {label} ({' + '.join(map(str, parts))}), layout {layout}")
    model = open_model(spec, label, reporter)
    room = context_length(model) - max(map(len, ids))
    if room < 1:
        raise LoramError(
            f"a prompt of {max(map(len, ids))} tokens leaves no room in {label}'s context of "
            f"{context_length(model)}",
            "shorten it",
        )
    new_tokens = min(spec.max_new_tokens, room)
    jobs = [
        Generation(
            prompt=example.prompt,
            stops=spec.stop,
            max_new_tokens=new_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            seed=stream_seed(spec.seed, example.prompt, place),
        )
        for place, example in enumerate(examples)
    ]
    with reporter.progress(label, new_tokens, "token") as progress:
        texts = Decoder(model, tokenizer).generate(ids, jobs, progress.advance)
    return [
        Answer(row=label, prompt=prompt, rendered=example.prompt, text=text.strip())
        for prompt, example, text in zip(spec.prompts, examples, texts, strict=True)
    ]


def to_mapping(answers: Sequence[Answer]) -> dict[str, Any]:
    """Plain form for ``--json``."""
    return {"answers": [answer.to_mapping() for answer in answers]}
