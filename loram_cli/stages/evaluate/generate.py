"""Generate: what the models of a run answer to a prompt."""

from typing import Any

from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError
from loram_cli.evaluation.decode import Decoder, Generation, stream_seed
from loram_cli.evaluation.models import row_tokenizer
from loram_cli.evaluation.perplexity import context_length
from loram_cli.evaluation.results import Answer
from loram_cli.modeling.load import warn_of_unused_gpu
from loram_cli.reporting import Reporter
from loram_cli.stages.core.lineage import trained_layout
from loram_cli.stages.evaluate.rows import checked_models, open_row
from loram_cli.stages.evaluate.spec import AnswersSpec, GenerateSpec
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.layouts import Layout, asked
from loram_cli.training.data.tokens import encode_prompt

__all__ = ["Answer", "GenerateSpec", "run"]


def run(spec: GenerateSpec, reporter: Reporter) -> list[Answer]:
    """Ask every row every prompt; rows are loaded one after another.

    Raises:
        LoramError: A model or an adapter is not whole or does not fit, or a prompt is too long.
    """
    warn_of_unused_gpu(spec.device, reporter)
    models = checked_models(spec.rows, reporter)
    learnt = learnt_layout(spec)
    return [
        answer
        for label, parts in spec.rows.items()
        for answer in _ask(spec, label, models[parts[0]], learnt, reporter)
    ]


def learnt_layout(spec: AnswersSpec) -> Layout | None:
    """The layout that the first of the rows with a training on record learnt from."""
    found = (trained_layout(parts[-1]) for parts in spec.rows.values())
    return next((layout for layout in found if layout is not None), None)


def asking_layout(spec: AnswersSpec, tokenizer: Any, learnt: Layout | None) -> Layout:
    """How a row is asked: as told, as it learnt, or as its tokenizer has it."""
    own: Layout = "messages" if getattr(tokenizer, "chat_template", None) else "prompt"
    return spec.layout or learnt or own


def _ask(
    spec: GenerateSpec, label: str, model: Model, learnt: Layout | None, reporter: Reporter
) -> list[Answer]:
    parts = spec.rows[label]
    tokenizer = row_tokenizer(parts, spec.model)
    layout = asking_layout(spec, tokenizer, learnt)
    chat = Chat(tokenizer)
    examples = [asked(prompt, layout, chat, learnt=layout == learnt) for prompt in spec.prompts]
    chat.warn_of_fallback(reporter)
    ids = [
        encode_prompt(example.prompt, tokenizer, special_tokens=example.special_tokens)
        for example in examples
    ]
    reporter.note(f"asking {label} ({' + '.join(map(str, parts))}), layout {layout}")
    with open_row(spec, label, model, reporter) as loaded:
        context = context_length(loaded)
        longest = max(map(len, ids))
        if not all(ids):
            raise LoramError(
                f"{parts[0]}: its tokenizer makes no token of a prompt",
                "pass a prompt that is not empty, or another --layout",
            )
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
            texts = Decoder(loaded, tokenizer).generate(ids, jobs, progress.advance)
    return [
        Answer(row=label, prompt=prompt, rendered=example.prompt, text=text.strip())
        for prompt, example, text in zip(spec.prompts, examples, texts, strict=True)
    ]
