"""The comparison of several models as cells, Markdown and CSV. Pure: results in, text out."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from typing import Any

from loram_cli.evaluation.requests import TaskScore
from loram_cli.evaluation.results import EvalResult, TrainingCost
from loram_cli.units import format_bytes, format_params, format_seconds

SAMPLE_NOTE = "bundled sample, not the published benchmark"
_SHORT_METRICS = {
    "exact_match,strict-match": "strict",
    "exact_match,flexible-extract": "flexible",
    "exact_match": "exact",
}
_CSV_FIELDS = (
    "task", "metric", "value", "ci_low", "ci_high", "stderr", "samples", "num_fewshot", "variant",
    "group", "bundled", "higher_is_better", "skipped", "detail",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One figure of the table: the lines over it, and a cell for each row."""

    header: tuple[str, ...]
    cells: tuple[str, ...]


def title(result: EvalResult) -> str:
    """What the table shows: in which precision, and whether its documents are no benchmark."""
    precision = ", weights in NF4" if result.quantize == "nf4" else ""
    return "held-out results" + precision + (f" ({SAMPLE_NOTE})" if result.bundled else "")


def score_columns(result: EvalResult) -> list[Column]:
    """A column for each figure that any row has, in the order of the tasks."""
    columns = []
    for key in dict.fromkeys((score.task, score.metric) for score in result.scores()):
        found = [row.find(*key) for row in result.rows.values()]
        first = next(score for score in found if score is not None)
        columns.append(Column(_header(first), tuple(score_text(score) for score in found)))
    return columns


def training_columns(result: EvalResult) -> list[Column]:
    """What each row cost to train; empty when no row was trained."""
    costs = [row.training for row in result.rows.values()]
    if not any(costs):
        return []

    def column(header: tuple[str, ...], text: Callable[[TrainingCost], str]) -> Column:
        return Column(header, tuple(text(cost) if cost else "-" for cost in costs))

    return [
        column(("trained", "on"), lambda cost: format_params(cost.trained_on_params or 0)),
        column(("training", "memory"), lambda cost: format_bytes(cost.peak_memory_increase_bytes)),
        column(("training", "time"), lambda cost: format_seconds(cost.wall_seconds)),
    ]


def score_text(score: TaskScore | None) -> str:
    """A figure and the wider half of its 95% interval: ``51.2 ±2.7`` in percent, ``2.34 ±0.05``."""
    if score is None or score.value is None:
        return "not run"
    scale, digits = (100, 1) if is_share(score) else (1, 3 if score.value < 10 else 1)
    text = f"{score.value * scale:.{digits}f}"
    if score.ci_low is None or score.ci_high is None:
        return text
    margin = max(score.value - score.ci_low, score.ci_high - score.value)
    return f"{text} ±{margin * scale:.{digits}f}"


def is_share(score: TaskScore) -> bool:
    """Whether the figure is a share, to be shown in percent."""
    return score.higher_is_better and 0 <= (score.value or 0) <= 1


def remarks(result: EvalResult) -> list[str]:
    """Lines under the table: what did not run and why, counts, and what a reader must know."""
    first = next(iter(result.rows.values())).scores
    lines = list(dict.fromkeys(f"{s.task}: not run, {s.skipped}" for s in first if s.skipped))
    ran = [score for score in first if not score.skipped]
    if ran:
        counted = {score.task: score.samples for score in ran}
        lines.append("documents: " + ", ".join(f"{task} {n}" for task, n in counted.items()))
        lines.append("±: 95% confidence; shares in percent; perplexity: lower is better")
    for label, row in result.rows.items():
        for score in row.scores:
            detail = score.detail.partition("; sandbox:")[0]
            if score.value is not None and detail.startswith(("best of", "mean of")):
                lines.append(f"{score.task} {score.metric}, {label}: {detail}")
    asked = [label for label, row in result.rows.items() if row.chat]
    if asked:
        others = [label for label in result.rows if label not in asked]
        plain = f"; as plain text: {', '.join(others)}" if others else ""
        lines.append(f"asked by the chat template: {', '.join(asked)}{plain}")
    for label in ("recovered", "polished"):
        kept = ", ".join(f"{task} {s:.0%}" for task, s in gain_retention(result, label).items())
        whose = "" if label == "recovered" else f" ({label})"
        if kept:
            lines.append(f"kept of full LoRA's gain over the base{whose}: {kept}")
    if any(row.training for row in result.rows.values()):
        lines.append("training memory: peak above what was in use when training began")
    return lines


def gain_retention(result: EvalResult, row: str = "recovered") -> dict[str, float]:
    """(recovered - base) / (full LoRA - base) of each task's headline figure, as in Table 7.

    Only where full LoRA's gain lies outside both intervals' reach: a ratio of noise is no figure.
    """
    rows = result.rows
    if not {"base", row, "full-lora"} <= set(rows):
        return {}
    headline: dict[str, str] = {}
    for score in rows["base"].scores:
        if not score.group:
            headline.setdefault(score.task, score.metric)
    shares = {}
    for key in headline.items():
        base, ours, full = (rows[name].find(*key) for name in ("base", row, "full-lora"))
        if base is None or ours is None or full is None or not base.higher_is_better:
            continue
        if base.value is None or ours.value is None or full.value is None:
            continue
        if base.ci_high is None or full.ci_low is None or full.ci_low <= base.ci_high:
            continue
        shares[key[0]] = (ours.value - base.value) / (full.value - base.value)
    return shares


def to_markdown(result: EvalResult) -> str:
    """The whole table in one, and its remarks."""
    columns = [*training_columns(result), *score_columns(result)]
    header = ["model", *(" ".join(column.header) for column in columns)]
    lines = [f"### {title(result)}", "", _md(header), _md(["---"] * len(header))]
    for place, label in enumerate(result.rows):
        lines.append(_md([label, *(column.cells[place] for column in columns)]))
    lines += ["", *(f"- {remark}" for remark in remarks(result))]
    return "\n".join(lines) + "\n"


def to_csv(result: EvalResult) -> str:
    """One line for each row and figure, unrounded."""
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["model", *_CSV_FIELDS])
    for label, row in result.rows.items():
        for score in row.scores:
            values: list[Any] = [getattr(score, name) for name in _CSV_FIELDS]
            writer.writerow([label, *("" if value is None else value for value in values)])
    return stream.getvalue()


def _header(score: TaskScore) -> tuple[str, ...]:
    if score.task == score.metric:
        return (score.task,)
    how = [score.variant] if score.variant else []
    if score.num_fewshot or score.variant:
        how.append(f"{score.num_fewshot}-shot")
    metric = _SHORT_METRICS.get(score.metric, score.metric)
    return tuple(filter(None, (score.task, " ".join(how), metric)))


def _md(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
