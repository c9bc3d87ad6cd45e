"""Saved outputs of several models, document by document."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loram_cli.errors import LoramError, UsageError

Only = Literal["wrong", "right", "differ"]
_PREFIX = "samples-"
_FIELDS = {"task", "doc_id", "prompt", "target"}


def samples_name(label: str) -> str:
    """File name of a row's samples."""
    return f"{_PREFIX}{label}.jsonl"


@dataclass(frozen=True)
class Document:
    """One document and what each model made of it.

    Attributes:
        doc_id: Its number or name in the data.
        target: The right answer.
        outputs: By row: the saved sample.
    """

    task: str
    doc_id: str
    prompt: str
    target: str
    outputs: dict[str, Mapping[str, Any]]

    def verdict(self, label: str) -> bool:
        """Whether a row's output counts as right."""
        return is_right(self.outputs[label])


def is_right(sample: Mapping[str, Any]) -> bool:
    """Whether a sample counts as right."""
    correct = sample.get("correct")
    return isinstance(correct, bool | int | float) and correct > 0


def load_documents(
    directory: Path,
    *,
    rows: Sequence[str] | None = None,
    task: str | None = None,
    only: Only | None = None,
    limit: int | None = None,
) -> list[Document]:
    """Read the samples of an evaluation.

    Of several filters or samples of a document the first one counts. ``only`` keeps documents
    where some row is ``wrong``, all are ``right``, or rows ``differ``.

    Raises:
        LoramError: No evaluation there, or its samples cannot be read.
        UsageError: An unknown row or task.
    """
    files = {
        file.name[len(_PREFIX) : -len(".jsonl")]: file for file in directory.glob(f"{_PREFIX}*")
    }
    if not files:
        raise LoramError(f"{directory}: no evaluation with samples here", "run 'loram eval' first")
    for label in rows or ():
        if label not in files:
            raise UsageError(f"--rows {label}: no such row", f"rows: {', '.join(sorted(files))}")
    found: dict[tuple[str, str], Document] = {}
    for label in rows or _in_order(directory, files):
        for sample in _read(files[label]):
            key = (str(sample["task"]), str(sample["doc_id"]))
            document = found.setdefault(
                key, Document(*key, str(sample["prompt"]), str(sample["target"]), {})
            )
            document.outputs.setdefault(label, sample)
    tasks = list(dict.fromkeys(name for name, _ in found))
    if task is not None and task not in tasks:
        raise UsageError(f"--task {task}: no samples of it", f"tasks: {', '.join(tasks) or 'none'}")
    kept = [
        document
        for document in found.values()
        if task in (None, document.task) and _matches(document, only)
    ]
    return kept[:limit]


def _matches(document: Document, only: Only | None) -> bool:
    verdicts = {document.verdict(label) for label in document.outputs}
    if only == "wrong":
        return False in verdicts
    if only == "right":
        return verdicts == {True}
    return only is None or len(verdicts) > 1


def _in_order(directory: Path, files: Mapping[str, Path]) -> list[str]:
    """Rows in the order of the table, where the results are there to tell."""
    try:
        order = list(json.loads((directory / "results.json").read_text("utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        order = []
    return sorted(sorted(files), key=lambda label: [*order, label].index(label))


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        # Texts hold other line ends as they are.
        lines = [line for line in file.read_text("utf-8").split("\n") if line]
        samples = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise LoramError(f"{file}: samples cannot be read ({error})") from error
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample, dict) or not set(sample) >= _FIELDS:
            raise LoramError(f"{file}, line {number}: no sample of an evaluation")
    return samples
