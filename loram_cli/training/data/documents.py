"""Training data as text: documents for alignment, prompt and completion for fine-tuning."""

import os
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.training.data.layouts import (
    LAYOUTS,
    Chat,
    Example,
    Layout,
    examples_of,
    layout_of,
    text_field,
)
from loram_cli.training.data.records import (
    DEMO_PREFIX,
    Record,
    is_text_file,
    local_files,
    read_records,
    read_text_file,
)

T = TypeVar("T")

# Two or more blank lines part documents; one blank line parts paragraphs of the same document.
_DOCUMENT_BREAK = re.compile(r"\n[^\S\n]*\n[^\S\n]*\n\s*|<\|endoftext\|>")
_MAX_DOCUMENT_CHARS = 20_000


def load_text(
    source: str, *, limit: int | None = None, reporter: Reporter | None = None
) -> list[str]:
    """Documents to continue pre-training, or to calibrate, on.

    Plain text is cut into documents where two or more lines are blank (and at ``<|endoftext|>``),
    and every 20,000 characters at a line's end. Records give their ``text`` field; records in an
    instruction layout give prompt and completion as one text.

    Args:
        source: A .txt, .jsonl(.gz), .json or .parquet file, a folder of those, ``demo:corpus``,
            ``demo:calibration``, or a hub data set id ``owner/name[:config][@split]``.
        limit: Take at most so many documents.
        reporter: Told of documents left out because they are empty.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    texts: list[str] = []
    empty = 0
    for text in _documents(source, limit):
        if not text.strip():
            empty += 1
            continue
        texts.append(text)
        if limit is not None and len(texts) >= limit:
            break
    if empty:
        (reporter or NullReporter()).warn(f"{source}: {empty} empty documents left out")
    if not texts:
        raise LoramError(f"{source}: no text in it")
    return texts


def load_instructions(
    source: str,
    *,
    tokenizer: Any | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> list[Example]:
    """Examples to fine-tune on; each record's layout is told by its fields.

    ``question``/``answer`` is rendered exactly as lm-eval's gsm8k does, ``instruction``/``output``
    by Alpaca's template, ``messages`` by the tokenizer's chat template: one example for each of
    the assistant's turns.

    Args:
        source: A .jsonl(.gz), .json or .parquet file, a folder of those, ``demo:train``,
            ``demo:validation``, ``demo:test``, or a hub id ``owner/name[:config][@split]``.
        tokenizer: Whose chat template renders messages.
        limit: Read at most so many records.
        reporter: Told of what is left out or rendered without a chat template.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """
    reporter = reporter or NullReporter()
    chat = Chat(tokenizer)
    examples: list[Example] = []
    empty = 0
    for record in read_records(source, limit=limit):
        for example in examples_of(record, chat):
            if example.completion.strip():
                examples.append(example)
            else:
                empty += 1
    if empty:
        reporter.warn(f"{source}: {empty} examples with an empty answer left out")
    chat.warn_of_fallback(reporter)
    if not examples:
        raise LoramError(f"{source}: no examples in it", f"layouts: {LAYOUTS}")
    return examples


def source_layout(source: str) -> Layout | None:
    """The layout of the first record: in which a model that learnt from it is to be asked.

    Args:
        source: As for :func:`load_instructions`.

    Returns:
        None where it is neither an instruction layout nor a pair of preferences.
    """
    first = next(iter(read_records(source, limit=1)), None)
    if first is None:
        return None
    fields = first.fields
    if "chosen" in fields:
        # A conversation may leave its prompt to both answers.
        return "messages" if isinstance(fields["chosen"], list) else "prompt"
    return layout_of(fields)


def split_eval(items: Sequence[T], fraction_or_count: float, seed: int) -> tuple[list[T], list[T]]:
    """Set a random part aside for evaluation; both parts keep their order.

    Args:
        items: What to split.
        fraction_or_count: Below 1 a share, from 1 on a count; 0 sets nothing aside.
        seed: Decides which.

    Returns:
        Training part and evaluation part.

    Raises:
        UsageError: Negative, not whole, or nothing would be left to train on.
    """
    wanted = fraction_or_count
    if wanted < 0 or (wanted >= 1 and wanted != int(wanted)):
        raise UsageError(f"evaluation split {wanted:g}: a share below 1 or a whole count is wanted")
    count = int(wanted) if wanted >= 1 else round(wanted * len(items))
    if 0 < wanted < 1:
        count = max(1, count)
    if count >= len(items) > 0 and count:
        raise UsageError(
            f"evaluation split {wanted:g} takes all {len(items)} examples",
            "set less aside, or pass more data",
        )
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    return (
        [item for i, item in enumerate(items) if i not in chosen],
        [item for i, item in enumerate(items) if i in chosen],
    )


def _documents(source: str, limit: int | None) -> Iterator[str]:
    is_demo = source.startswith(DEMO_PREFIX)
    files = None if is_demo else local_files(source)
    if files is None:
        yield from (_text_of(record) for record in read_records(source, limit=limit))
        return
    for file in files:
        if is_text_file(file):
            yield from _split_documents(read_text_file(file))
        else:
            yield from (_text_of(record) for record in read_records(os.fspath(file)))


def _split_documents(text: str) -> Iterator[str]:
    for document in _DOCUMENT_BREAK.split(text.replace("\r\n", "\n")):
        rest = document
        while len(rest) > _MAX_DOCUMENT_CHARS:
            cut = rest.rfind("\n", 0, _MAX_DOCUMENT_CHARS) + 1 or _MAX_DOCUMENT_CHARS
            yield rest[:cut]
            rest = rest[cut:]
        if rest.strip():
            yield rest


def _text_of(record: Record) -> str:
    if "text" in record.fields:
        return text_field(record, "text")
    try:
        examples = examples_of(record, Chat(None))
    except LoramError:
        raise LoramError(
            f"{record.where}: no field 'text' (fields: {', '.join(record.fields) or 'none'})"
        ) from None
    # Turns share their beginnings; the last prompt holds all of them.
    return examples[-1].prompt + examples[-1].completion
