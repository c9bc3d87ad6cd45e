"""Draws evaluations: the table of models, and their outputs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loram_cli.cli.draw.console import stdout_console
from loram_cli.evaluation.comparison import (
    Column,
    remarks,
    score_columns,
    title,
    training_columns,
)
from loram_cli.evaluation.results import EvalResult
from loram_cli.evaluation.samples import Document
from loram_cli.stages.core.lifecycle import StageResult
from loram_cli.stages.evaluate.results import read_results

WIDTH = 100
_PROMPT_CHARS = 700
_OUTPUT_CHARS = 900
_ROWS_ACROSS = 3


def show_scores(result: StageResult) -> None:
    """Print the comparison of an evaluation, and the remarks under it."""
    console = stdout_console()
    # The manifest is written with sorted keys; the results keep the order of the rows.
    results = read_results(result.wrote)
    for table in score_tables(results):
        console.print(table)
    for remark in remarks(results):
        console.print(remark)
    console.print(f"saved: {result.wrote}/results.md, .csv, .json, .png; loram eval --show")


def score_tables(results: EvalResult) -> list[Table]:
    """The comparison: a row per model, a column per score; a table more where one is too wide."""
    labels = list(results.rows)
    label_width = max(len("model"), *map(len, labels))
    groups: list[list[Column]] = [[]]
    used = label_width + 2
    for column in [*training_columns(results), *score_columns(results)]:
        width = max(map(len, (*column.header, *column.cells))) + 2
        if used + width > WIDTH and groups[-1]:
            groups.append([])
            used = label_width + 2
        groups[-1].append(column)
        used += width
    tables = []
    for number, columns in enumerate(groups):
        heading = title(results) if number == 0 else None
        table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        table.add_column("model", no_wrap=True)
        for column in columns:
            table.add_column("\n".join(column.header), justify="right", no_wrap=True)
        for place, label in enumerate(labels):
            table.add_row(label, *(column.cells[place] for column in columns))
        tables.append(table)
    return tables


def show_documents(documents: Sequence[Document]) -> None:
    """Print documents with what each row made of them, rows side by side."""
    console = Console(highlight=False, markup=False, width=min(stdout_console().width, 130))
    if not documents:
        console.print("no document matches")
    for document in documents:
        console.rule(f"{document.task} {document.doc_id}", align="left", style="dim")
        console.print(Text(_end(document.prompt, _PROMPT_CHARS)))
        console.print(Text(f"right answer: {_start(document.target, _PROMPT_CHARS)}", style="bold"))
        labels = list(document.outputs)
        for first in range(0, len(labels), _ROWS_ACROSS):
            shown = labels[first : first + _ROWS_ACROSS]
            table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
            for label in shown:
                right = document.verdict(label)
                table.add_column(
                    Text(
                        f"{label}: {'right' if right else 'wrong'}",
                        style="green" if right else "red",
                    ),
                    ratio=1,
                    overflow="fold",
                )
            table.add_row(*(Text(_output(document.outputs[label])) for label in shown))
            console.print(table)


def documents_mapping(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Plain form for ``--json``."""
    return [asdict(document) for document in documents]


def _output(sample: Mapping[str, Any]) -> str:
    text = _start(str(sample["output"]).strip(), _OUTPUT_CHARS) or "(nothing)"
    extracted = sample.get("extracted")
    lines = [text]
    if isinstance(extracted, str) and extracted.strip() != str(sample["output"]).strip():
        lines.append(f"-> {extracted}")
    if sample.get("detail"):
        lines.append(f"-> {_start(sample['detail'], 200)}")
    return "\n".join(lines)


def _start(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 4] + " ..."


def _end(text: str, chars: int) -> str:
    """The prompt's end, where the question stands; examples before it are left out."""
    text = text.strip()
    return text if len(text) <= chars else "... " + text[-chars + 4 :]
