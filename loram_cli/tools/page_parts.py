"""Parts of a run's page that are worked out anew: answers beside each other, data, memory."""

import contextlib
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.evaluation.samples import Document, load_documents
from loram_cli.memory.picture import Bar
from loram_cli.reporting import NullReporter
from loram_cli.runs.manifest import Manifest
from loram_cli.stages.core.data_digests import data_digest
from loram_cli.tools import memory_report
from loram_cli.tools.specs import MemoryReportSpec
from loram_cli.units import common_unit, format_bytes

# Documents that are shown, those of them that are open at once, and characters of each text.
_MOST_DOCUMENTS = 12
_OPEN_DOCUMENTS = 3
_MOST_CHARACTERS = 1200
# Examples whose lengths are counted, and bars that they are counted in.
_MOST_EXAMPLES = 2000
_BARS = 24
# Settings of a training that the memory report takes by the same name.
_SETUP = (
    "rank", "dropout", "micro_batch", "gradient_checkpointing", "cross_entropy", "optimizer",
    "attention",
)  # fmt: skip


def answers(directory: Path) -> Iterator[str]:
    """The rows' answers side by side, those first where rows differ.

    Args:
        directory: Of an evaluation.
    """
    try:
        found = load_documents(directory)
    except LoramError:
        return
    found = [document for document in found if _texts(document)]
    differing = [d for d in found if len({d.verdict(label) for label in d.outputs}) > 1]
    rest = [document for document in found if document not in differing]
    shown = [*differing, *rest][:_MOST_DOCUMENTS]
    if not shown:
        return
    yield "<h2>Answers side by side</h2>"
    yield (
        f'<p class="note">{len(shown)} of {len(found)} documents, those first where rows differ '
        f"({len(differing)}). All of them: <code>loram eval --show</code>.</p>"
    )
    for place, document in enumerate(shown):
        yield from _document(document, is_open=place < _OPEN_DOCUMENTS)


def _document(document: Document, *, is_open: bool) -> Iterator[str]:
    question = document.prompt.strip().rpartition("\n\n")[-1]
    head = escape(f"{document.task} {document.doc_id}: {_short(question, 140)}")
    yield f"<details{' open' if is_open else ''}><summary>{head}</summary>"
    yield f'<p class="note">expected: {escape(_short(document.target, 200))}</p>'
    yield '<div class="answers">'
    for label, text in _texts(document).items():
        right = document.verdict(label)
        verdict = "right" if right else "wrong"
        yield (
            f'<section class="{verdict}"><h3>{escape(label)} <em>{verdict}</em></h3>'
            f"<pre>{escape(_short(text, _MOST_CHARACTERS)) or '(nothing)'}</pre></section>"
        )
    yield "</div></details>"


def _texts(document: Document) -> dict[str, str]:
    """What each row wrote; nothing for tasks that score likelihoods."""
    told = {label: sample.get("output") for label, sample in document.outputs.items()}
    return {label: text for label, text in told.items() if isinstance(text, str)}


def _short(text: str, most: int) -> str:
    text = text.strip()
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def data_lengths(manifest: Manifest, directory: Path) -> Iterator[str]:
    """A histogram of the training examples' lengths, read from the data as training reads it.

    Args:
        manifest: Of an SFT training.
        directory: Of the model that was trained, for its tokenizer.
    """
    spec = manifest.spec
    source, length = spec.get("data"), spec.get("max_length")
    if spec.get("objective", "sft") != "sft" or not isinstance(source, str) or not length:
        return
    yield "<h2>Training data</h2>"
    try:
        recorded = (manifest.inputs.get("data") or {}).get("content")
        if recorded is not None and data_digest(source) != recorded:
            raise LoramError(f"{source} has changed since")
        counted = _lengths(source, directory, spec, length)
    except LoramError as error:
        yield f'<p class="note">No histogram: {escape(error.message)}.</p>'
        return
    yield from _histogram(counted, length)


def _lengths(source: str, directory: Path, spec: Mapping[str, Any], length: int) -> list[int]:
    from loram_cli.modeling.load import load_tokenizer
    from loram_cli.training.data.preview import preview

    found = preview(
        source,
        load_tokenizer(directory),
        max_length=length,
        train_on=spec.get("train_on", "all"),
        loss_on_prompt=spec.get("loss_on") == "all",
        rows=0,
        limit=_MOST_EXAMPLES,
        seed=int(spec.get("seed", 0)),
    )
    if not found.lengths:
        raise LoramError(f"{source} holds no examples")
    return list(found.lengths)


def _histogram(lengths: list[int], limit: int) -> Iterator[str]:
    lowest, highest = min(lengths), max(lengths)
    width = max(1, -(-(highest - lowest + 1) // _BARS))
    counts = [0] * ((highest - lowest) // width + 1)
    for length in lengths:
        counts[(length - lowest) // width] += 1
    most = max(counts)
    cut = sum(length > limit for length in lengths)
    yield '<div class="histogram" role="img" aria-label="Tokens per example">'
    for i, count in enumerate(counts):
        first = lowest + i * width
        said = f"{first} to {first + width - 1} tokens: {count} examples"
        kind = ' class="cut"' if first > limit else ""
        yield f'<i{kind} title="{said}" style="height:{count / most:.1%}"></i>'
    yield "</div>"
    yield f'<p class="axis"><span>{lowest}</span><span>tokens</span><span>{highest}</span></p>'
    middle = sorted(lengths)[len(lengths) // 2]
    yield (
        f'<p class="note">{len(lengths):,} examples, median {middle} tokens; '
        f"{f'{cut} of them longer than' if cut else 'none longer than'} --max-length {limit}.</p>"
    )


def memory(manifests: Mapping[str, Manifest], run: Path, base: Path | None) -> Iterator[str]:
    """What training takes by arithmetic, of the base and of the small model, part by part.

    Args:
        manifests: Of the run's outputs, by the directory's name.
        run: The run directory.
        base: The original base, where it is at hand.
    """
    trained = next((m for m in manifests.values() if m.stage == "train"), None)
    pruned = next((name for name, m in manifests.items() if m.stage == "prune"), None)
    if trained is None or pruned is None or base is None:
        return
    spec = trained.spec
    values = {name: spec[name] for name in _SETUP if spec.get(name) is not None}
    try:
        report = memory_report.run(
            MemoryReportSpec(
                model=base,
                pruned=run / pruned,
                length=int(spec.get("max_length") or 512),
                targets=tuple(spec.get("targets") or ()),
                **values,
            ),
            NullReporter(),
        )
    except (LoramError, TypeError, ValueError):
        return
    precision = "nf4" if spec.get("quantize") else "bf16"
    bars = [row.bar() for row in report.rows if row.precision == precision]
    yield "<h2>Memory of training</h2>"
    yield from _bars(bars)
    measured = format_bytes(trained.peak_memory_increase_bytes)
    yield (
        f'<p class="note">By arithmetic, for a GPU: {escape(report.settings)}. Measured in this '
        f"run, on its machine and above what was in use before: {measured}.</p>"
    )


def _bars(bars: list[Bar]) -> Iterator[str]:
    most = max(bar.total_bytes for bar in bars)
    unit, unit_bytes = common_unit(most)
    yield '<div class="bars">'
    for bar in bars:
        parts = "".join(
            f'<b class="p{i}" style="width:{size / most:.2%}" '
            f'title="{escape(name)}: {format_bytes(size)}"></b>'
            for i, (name, size) in enumerate(bar.parts)
        )
        total = f"{bar.total_bytes / unit_bytes:.2f} {unit}"
        yield f"<span>{escape(bar.label)}</span><i>{parts}</i><span>{total}</span>"
    yield "</div>"
    names = "".join(
        f'<span><b class="p{i}"></b>{escape(name)}</span>'
        for i, (name, _) in enumerate(bars[0].parts)
    )
    yield f'<p class="legend">{names}</p>'


def base_at_hand(found: str | None) -> Path | None:
    """The base's directory, where it is still there."""
    with contextlib.suppress(OSError):
        path = Path(found) if found else None
        if path is not None and (path / "config.json").is_file():
            return path
    return None
