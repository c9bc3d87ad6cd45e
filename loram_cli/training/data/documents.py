"""Training data as text: documents for alignment, prompt and completion for fine-tuning."""

import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import NullReporter, Reporter
from loram_cli.training.choices import Exhausted
from loram_cli.training.data.chat import Chat
from loram_cli.training.data.conversations import TrainOn
from loram_cli.training.data.examples import Example
from loram_cli.training.data.fields import names_of, present
from loram_cli.training.data.files import is_text_file, read_pieces
from loram_cli.training.data.layouts import LAYOUTS, Layout, examples_of, layout_of, text_field
from loram_cli.training.data.preferences import preference_layout
from loram_cli.training.data.records import DEMO_PREFIX, Record, local_files, read_records
from loram_cli.training.data.sources import load_sources, parse_sources
from loram_cli.training.data.spool import Subset, spooled
from loram_cli.training.data.tally import Tally, UnusableRecord

T = TypeVar("T")

_END_OF_TEXT = "<|endoftext|>"
# Two or more blank lines part documents; one blank line parts paragraphs of the same document.
_DOCUMENT_BREAK = re.compile(r"\n[^\S\n]*\n[^\S\n]*\n\s*|<\|endoftext\|>")
_MAX_DOCUMENT_CHARS = 20_000


def load_text(
    source: str,
    *,
    limit: int | None = None,
    reporter: Reporter | None = None,
    seed: int = 0,
    exhausted: Exhausted = "stop",
) -> list[str]:
    """Documents to continue pre-training, or to calibrate, on.

    Plain text is cut into documents where two or more lines are blank (and at ``<|endoftext|>``),
    and every 20,000 characters at a line's end. Records give their ``text`` field; records in an
    instruction layout give prompt and completion as one text.

    ``source`` is a .txt, .jsonl, .json, .csv, .tsv (each also .gz) or .parquet file, a folder of
    those, ``demo:corpus``, ``demo:calibration``, a hub data set id ``owner/name[:config][@split]``,
    or several with weights, which :mod:`.sources` mixes by ``seed`` and ``exhausted``.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """

    def load(name: str) -> list[str]:
        return _load_text(name, limit, reporter or NullReporter())

    return list(load_sources(source, load, limit=limit, seed=seed, exhausted=exhausted))


def _load_text(source: str, limit: int | None, reporter: Reporter) -> list[str]:
    texts: list[str] = []
    tally = Tally()
    empty = 0
    for text in _documents(source, limit, tally):
        if not text.strip():
            empty += 1
            continue
        texts.append(text)
        if limit is not None and len(texts) >= limit:
            break
    if empty:
        reporter.warn(f"{source}: {empty} empty documents left out")
    if not texts:
        raise tally.nothing_left(source, "text", "pass data with text in it")
    tally.tell(source, reporter)
    return texts


def load_instructions(
    source: str,
    *,
    tokenizer: Any | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
    train_on: TrainOn = "all",
    seed: int = 0,
    exhausted: Exhausted = "stop",
) -> Sequence[Example]:
    """Examples to fine-tune on; each record's fields tell its layout.

    ``question``/``answer`` is rendered exactly as lm-eval's gsm8k does, ``instruction``/``output``
    by Alpaca's template, ``messages`` by the tokenizer's chat template, a whole conversation as
    one example; ``text`` is learnt whole.

    ``source`` is as for :func:`load_text`, or ``demo:train``, ``demo:validation``, ``demo:test``.
    One line with its count says what is left out, changed or not used; ``limit`` counts records.
    Examples that exceed :data:`.spool.MEMORY_BYTES` are kept in a file.

    Raises:
        LoramError: Missing, unreadable, malformed or empty; names file and line.
    """

    def load(name: str) -> Sequence[Example]:
        chat = Chat(tokenizer)
        read = read_examples(name, chat, limit=limit, train_on=train_on)
        found = spooled((example for _, example in read), lambda example: len(example.text))
        if not found:
            raise chat.tally.nothing_left(name, "examples", f"layouts: {LAYOUTS}")
        chat.tally.tell(name, reporter or NullReporter())
        chat.warn_of_fallback(reporter or NullReporter())
        return found

    return load_sources(source, load, limit=limit, seed=seed, exhausted=exhausted)


def read_examples(
    source: str, chat: Chat, *, limit: int | None = None, train_on: TrainOn = "all"
) -> Iterator[tuple[str, Example]]:
    """Examples of one source with their places; what is left out is counted in ``chat.tally``.

    Raises:
        LoramError: Missing, unreadable or malformed; names file and line.
    """
    for record in read_records(source, limit=limit):
        try:
            for example in examples_of(record, chat, train_on=train_on):
                yield record.where, example
        except UnusableRecord as unusable:
            chat.tally.leave_out(unusable)


def source_layout(source: str) -> Layout | None:
    """The layout of the first record: in which a model that learnt from it is to be asked.

    Of several sources the first counts.

    Returns:
        None where it is neither an instruction layout nor a pair of preferences.
    """
    name = parse_sources(source)[0].name
    first = next(iter(read_records(name, limit=1)), None)
    if first is None:
        return None
    return preference_layout(first) or layout_of(first.fields)


def split_eval(
    items: Sequence[T], fraction_or_count: float, seed: int
) -> tuple[Sequence[T], list[T]]:
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
        raise UsageError(f"evaluation split {wanted:g}: expected a share below 1 or a whole count")
    count = int(wanted) if wanted >= 1 else round(wanted * len(items))
    if 0 < wanted < 1:
        count = max(1, count)
    if count >= len(items) > 0 and count:
        raise UsageError(
            f"evaluation split {wanted:g} takes all {len(items)} examples",
            "set less aside, or pass more data",
        )
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    held_out = [items[i] for i in sorted(chosen)]
    rest = [i for i in range(len(items)) if i not in chosen]
    if isinstance(items, list):
        return [items[i] for i in rest], held_out
    return Subset(items, rest), held_out


def _documents(source: str, limit: int | None, tally: Tally) -> Iterator[str]:
    is_demo = source.startswith(DEMO_PREFIX)
    files = None if is_demo else local_files(source)
    if files is None:
        yield from _texts_of(read_records(source, limit=limit), tally)
        return
    for file in files:
        if is_text_file(file):
            yield from _split_documents(read_pieces(file))
        else:
            yield from _texts_of(read_records(os.fspath(file)), tally)


def _split_documents(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        rest = (rest + piece).replace("\r\n", "\n")
        start = 0
        for found in _DOCUMENT_BREAK.finditer(rest):
            # A break at the very end may go on in the next piece.
            if found.end() == len(rest):
                break
            yield from _cut(rest[start : found.start()])
            start = found.end()
        rest = rest[start:]
        while len(rest.rstrip()) > _MAX_DOCUMENT_CHARS + len(_END_OF_TEXT):
            cut = _line_end(rest)
            yield rest[:cut]
            rest = rest[cut:]
    for document in _DOCUMENT_BREAK.split(rest):
        yield from _cut(document)


def _cut(document: str) -> Iterator[str]:
    while len(document) > _MAX_DOCUMENT_CHARS:
        cut = _line_end(document)
        yield document[:cut]
        document = document[cut:]
    if document.strip():
        yield document


def _line_end(document: str) -> int:
    return document.rfind("\n", 0, _MAX_DOCUMENT_CHARS) + 1 or _MAX_DOCUMENT_CHARS


def _texts_of(records: Iterable[Record], tally: Tally) -> Iterator[str]:
    chat = Chat(None)
    for record in records:
        try:
            yield _text_of(record, chat, tally)
        except UnusableRecord as unusable:
            tally.leave_out(unusable)


def _text_of(record: Record, chat: Chat, tally: Tally) -> str:
    if "text" in present(record.fields):
        return text_field(record, "text", tally)
    try:
        (example,) = examples_of(record, chat)
    except UnusableRecord:
        raise
    except LoramError:
        raise LoramError(f"{record.where}: no field 'text' {names_of(record.fields)}") from None
    return example.text
