"""A task's documents from a local file, in the data set's published layout or the hub's."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.evaluation.requests import TaskRequest
from loram_cli.reading import read_text
from loram_cli.training.data.documents import load_instructions, load_text
from loram_cli.training.data.examples import Example, single_turns
from loram_cli.training.data.files import is_text_file, read_text_file
from loram_cli.training.data.layouts import layout_of
from loram_cli.training.data.records import Record, read_records

# Fields that the task's prompts and scoring need; checked before the first forward pass.
_REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("question", "answer"),
    "humaneval": ("task_id", "prompt", "test", "entry_point"),
    "mathqa": ("Problem", "options", "correct"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
}
_SAME_LAYOUT = {"gsm8k_cot": "gsm8k", "gsm8k_cot_zeroshot": "gsm8k"}


def task_documents(source: str, task: str, flag: str) -> list[dict[str, Any]]:
    """All documents of a task's file, as the hub's copy of the data set has them.

    Raises:
        LoramError: Unreadable, empty, or a document lacks a field; names file and line.
    """
    where = f"--task-data {flag}"
    try:
        records = list(read_records(source))
    except LoramError as error:
        raise LoramError(f"{where}: {error.message}", error.hint) from error
    if not records:
        raise LoramError(f"{where}: {source}: holds no record")
    layout = _SAME_LAYOUT.get(task, task)
    convert = _CONVERTERS.get(layout)
    if layout == "piqa":
        records = _with_piqa_labels(records, Path(source), where)
    try:
        records = [Record(convert(r.fields), r.where) for r in records] if convert else records
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoramError(f"{where}: {source} is not in the layout of {task} ({error})") from error
    for record in records:
        for field in _REQUIRED_FIELDS.get(layout, ()):
            if record.fields.get(field) is None:
                raise LoramError(
                    f"{where}: {record.where}: field '{field}' of {task} is missing "
                    f"(fields: {', '.join(map(str, record.fields)) or 'none'})"
                )
    return [dict(record.fields) for record in records]


def check_documents(request: TaskRequest) -> None:
    """Read a task's local files as a dry run does: every document has the fields that it needs.

    Raises:
        LoramError: As :func:`task_documents`; for perplexity, records of no known layout.
    """
    if request.name != "perplexity":
        train = "" if request.train_file is None else str(request.train_file)
        for flag, path in ((request.name, request.documents), (f"{request.name}:train", train)):
            if path:
                task_documents(path, request.lm_eval_name, flag)
        return
    file = request.data_file
    if file is None or is_text_file(file):
        return
    try:
        first = next(iter(read_records(str(file), limit=1)), None)
    except LoramError as error:
        raise LoramError(f"--task-data perplexity: {error.message}", error.hint) from error
    if first is None or layout_of(first.fields) is None:
        where = f"{file}: holds no record" if first is None else f"{first.where}: no known layout"
        raise LoramError(f"--task-data perplexity: {where}", "expected text or instructions")


def perplexity_data(
    path: Path, tokenizer: Any, limit: int | None
) -> tuple[list[Example], list[str]]:
    """What to score: (examples, no texts) from instructions, (no examples, texts) from text.

    Examples are rendered by the very code that renders training data.

    Args:
        path: Plain text, or records with ``text`` or in any layout that training reads.
        tokenizer: Whose chat template renders messages.
        limit: Records at most; plain text is one document and is not cut.

    Raises:
        LoramError: Unreadable, empty or of no known layout; names file and line.
    """
    try:
        if is_text_file(path):
            return [], [read_text_file(path)]
        first = next(iter(read_records(str(path), limit=1)), None)
        if first is not None and layout_of(first.fields) == "text":
            return [], load_text(str(path), limit=limit)
        found = load_instructions(str(path), tokenizer=tokenizer, limit=limit)
        return [turn for example in found for turn in single_turns(example)], []
    except LoramError as error:
        raise LoramError(f"--task-data perplexity: {error.message}", error.hint) from error


def _stem_layout(fields: Mapping[str, Any]) -> dict[str, Any]:
    """AI2's own files nest the choices in the question; the hub's copies do not."""
    question = fields.get("question")
    if not isinstance(question, dict):
        return dict(fields)
    choices, stem = question.get("choices") or [], question.get("stem")
    parts = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    return {**fields, "question": stem, "question_stem": stem, "choices": parts}


def _hellaswag_layout(fields: Mapping[str, Any]) -> dict[str, Any]:
    """HellaSwag's own label is a number, the hub's a text; the endings are a list in both."""
    changed = dict(fields)
    if isinstance(fields.get("endings"), str):
        changed["endings"] = json.loads(fields["endings"])
    if fields.get("label") is not None:
        changed["label"] = str(fields["label"])
    return changed


_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa"), _stem_layout),
    "hellaswag": _hellaswag_layout,
}


def _with_piqa_labels(records: list[Record], path: Path, where: str) -> list[Record]:
    """PIQA's own files keep the labels in ``NAME-labels.lst`` beside ``NAME.jsonl``."""
    labels_file = path.with_name(path.name.partition(".")[0] + "-labels.lst")
    if "label" in records[0].fields or not labels_file.is_file():
        return records
    labels = read_text(labels_file).split()
    if len(labels) != len(records) or set(labels) - {"0", "1"}:
        raise LoramError(
            f"{where}: {labels_file}: {len(labels)} labels for {len(records)} documents of {path}"
        )
    return [
        Record({**record.fields, "label": int(label)}, record.where)
        for record, label in zip(records, labels, strict=True)
    ]
