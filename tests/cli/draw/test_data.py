"""How a preview is drawn: what is learnt, lengths, and what is left out."""

from loram_cli.cli.draw.data import histogram, printable, row_text, summary_lines
from loram_cli.training.data.preview import Preview, PreviewRow, Segment
from loram_cli.training.data.tally import Count

ROW = PreviewRow("a.jsonl, line 1", (Segment("Q\x1b[31m ", False), Segment("A", True)), 4, 1, False)


def test_what_is_learnt_is_green_or_in_brackets():
    assert row_text(ROW, colour=False).plain == "Q\\x1b[31m ⟦A⟧"
    text = row_text(ROW, colour=True)
    assert text.plain == "Q\\x1b[31m A"
    assert [(span.start, span.end, str(span.style)) for span in text.spans] == [
        (0, 10, "dim"),
        (10, 11, "bold green"),
    ]
    long = PreviewRow("w", (Segment("a" * 3000, True),), 1, 1, False)
    assert "...[1000 characters]..." in row_text(long, colour=True).plain
    assert printable("a\tb\nc\x07") == "a\tb\nc\\x07"


def test_the_histogram_counts_every_length_once():
    lines = list(histogram([3, 3, 3, 5, 40], 20))
    assert len(lines) == 11
    assert sum(int(line.split("█")[-1].split()[0]) for line in lines if "█" in line) == 5
    assert lines[0].split() == ["0-3", "█" * 40, "3"]
    assert lines[-1].split()[-2:] == ["1", "cut"]
    assert list(histogram([7], 9)) == [f"  7-7 {'█' * 40} 1"]


def test_the_summary_says_what_is_left_out_and_why():
    seen = Preview(
        rows=(), examples=3, kept=0, cut=1, lengths=(9, 9, 30), tokens=0, learnt_tokens=0,
        dropped={"'answer' is null": Count(2, "a.jsonl, line 4")}, changed={},
        unused={"'id'": Count(3, "a.jsonl, line 1")}, foreign_markers=("<|im_start|>",),
        has_template=False,
    )  # fmt: skip
    text = "\n".join(summary_lines(seen, 16))
    assert "rows: 0 to train on, of 3 read" in text
    assert "left out:\n  2: 'answer' is null (the first: a.jsonl, line 4)" in text
    assert "fields ignored:\n  3: 'id'" in text
    assert "1 longer than 16, cut at the end" in text
    assert "<|im_start|> are not tokens of this model" in text
    assert "nothing would be learnt" in text
