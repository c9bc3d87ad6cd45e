"""Draws what training would learn: rows with the learnt part marked, lengths, what is left out."""

from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text

from loram_cli.cli.draw.console import stdout_console
from loram_cli.errors import one_line
from loram_cli.tools.data_spec import DataSpec
from loram_cli.training.data.preview import Preview, PreviewRow
from loram_cli.training.data.tally import Count

_BAR_CELLS = 40
_BINS = 12
_SHOWN_CHARS = 2000
_LEARNT, _AVOIDED = "bold green", "bold red"
# Where there is no colour; no shown text holds them by chance.
_OPEN, _CLOSE = "⟦", "⟧"
_OPEN_AVOIDED, _CLOSE_AVOIDED = "⟦-", "-⟧"


def show_preview(found: Preview, spec: DataSpec) -> None:
    """Print the first rows, the counts, the lengths, and what is left out."""
    console = stdout_console()
    colour = console.color_system is not None
    learnt = Text("what is learnt", _LEARNT) if colour else f"{_OPEN}what is learnt{_CLOSE}"
    words: list[Text | str | tuple[str, str]] = ["as training reads it, ", learnt]
    if any(segment.avoided for row in found.rows for segment in row.segments):
        avoided = f"{_OPEN_AVOIDED}what is unlearnt{_CLOSE_AVOIDED}"
        words += [" and ", ("what is unlearnt", _AVOIDED) if colour else avoided]
    if found.rows:
        console.print(Text.assemble(*words, ":"))
    for row in found.rows:
        cut = f", cut to {row.tokens}" if row.cut else ""
        console.print()
        console.print(
            Text(f"{row.where} ({row.tokens} tokens, {row.learnt_tokens} learnt{cut})", "dim")
        )
        console.print(row_text(row, colour=colour))
    console.print()
    for line in summary_lines(found, spec.max_length):
        console.print(line)


def row_text(row: PreviewRow, *, colour: bool) -> Text:
    """A row, its learnt parts green, or in brackets; long given parts lose their middle."""
    text = Text()
    for segment in row.segments:
        shown = printable(_shortened(segment.text))
        if not segment.learnt:
            text.append(shown, "dim")
        elif colour:
            text.append(shown, _AVOIDED if segment.avoided else _LEARNT)
        elif segment.avoided:
            text.append(f"{_OPEN_AVOIDED}{shown}{_CLOSE_AVOIDED}")
        else:
            text.append(f"{_OPEN}{shown}{_CLOSE}")
    return text


def printable(text: str) -> str:
    """Text with its terminal codes spelt out; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" else one_line(c) for c in text)


def summary_lines(found: Preview, max_length: int) -> Iterator[str]:
    """Counts, lengths, and what is left out, changed or ignored, each with the first place."""
    yield f"rows: {found.kept} to train on, of {found.examples} read"
    share = f" ({found.learnt_tokens / found.tokens:.0%})" if found.tokens else ""
    yield f"tokens: {found.tokens}, {found.learnt_tokens} of them learnt{share}"
    if found.lengths:
        yield f"lengths in tokens, cut at {max_length} (--max-length): {_spread(found.lengths)}"
        yield from histogram(found.lengths, max_length)
        if found.cut:
            yield f"  {found.cut} longer than {max_length}, cut at the end"
    yield from _counted("left out", found.dropped)
    yield from _counted("read differently", found.changed)
    yield from _counted("fields ignored", found.unused)
    for line in found.told:
        yield f"told: {line}"
    if found.foreign_markers:
        yield (
            f"warning: {', '.join(found.foreign_markers)} are not tokens of this model: is the "
            "text in another model's chat format?"
        )
    if not found.has_template:
        yield "the tokenizer has no chat template (--chat-template gives it one)"
    if not found.kept:
        yield "nothing would be learnt from this data"


def histogram(lengths: Sequence[int], max_length: int) -> Iterator[str]:
    """One line for each range of lengths: its bounds, a bar, how many, and whether they are cut."""
    shortest, longest = min(lengths), max(lengths)
    width = -(-(longest + 1 - shortest) // _BINS)
    skipped = shortest // width
    counts = [0] * (longest // width + 1 - skipped)
    for length in lengths:
        counts[length // width - skipped] += 1
    most = max(counts)
    digits = len(str(longest + width))
    for place, count in enumerate(counts, skipped):
        first, last = place * width, (place + 1) * width - 1
        bar = "█" * -(-count * _BAR_CELLS // most)
        cut = "  cut" if count and first > max_length else ""
        yield f"  {first:>{digits}}-{last:<{digits}} {bar:<{_BAR_CELLS}} {count}{cut}"


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    mean = sum(ordered) / len(ordered)
    return f"mean {mean:.0f}, median {ordered[len(ordered) // 2]}, longest {ordered[-1]}"


def _counted(title: str, counts: Mapping[str, Count]) -> Iterator[str]:
    if not counts:
        return
    yield f"{title}:"
    for reason, count in counts.items():
        yield f"  {count.number}: {reason} (the first: {count.first})"


def _shortened(text: str) -> str:
    half = _SHOWN_CHARS // 2
    if len(text) <= _SHOWN_CHARS:
        return text
    return f"{text[:half]} ...[{len(text) - 2 * half} characters]... {text[-half:]}"
