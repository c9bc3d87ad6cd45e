"""The comparison of several models as cells, Markdown and CSV. Pure: results in, text out."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loram_cli.units import format_bytes, format_params, format_seconds

Results = Mapping[str, Any]
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


def title(results: Results) -> str:
    """What the table shows: in which precision, and whether its documents are no benchmark."""
    precision = ", weights in NF4" if results.get("quantize") == "nf4" else ""
    return "held-out results" + precision + (f" ({SAMPLE_NOTE})" if results["bundled"] else "")


def score_columns(results: Results) -> list[Column]:
    """A column for each figure that any row has, in the order of the tasks."""
    keys = dict.fromkeys((s["task"], s["metric"]) for s in _scores(results))
    columns = []
    for key in keys:
        found = [_find(row, key) for row in results["rows"].values()]
        first = next(score for score in found if score is not None)
        columns.append(Column(_header(first), tuple(score_text(score) for score in found)))
    return columns


def training_columns(results: Results) -> list[Column]:
    """What each row cost to train; empty when no row was trained."""
    records = [row["training"] for row in results["rows"].values()]
    if not any(records):
        return []

    def column(header: tuple[str, ...], text: Any) -> Column:
        return Column(header, tuple(text(r) if r else "-" for r in records))

    return [
        column(("trained", "on"), lambda r: format_params(r["trained_on_params"])),
        column(("training", "memory"), lambda r: format_bytes(r["peak_memory_increase_bytes"])),
        column(("training", "time"), lambda r: format_seconds(r["wall_seconds"])),
    ]


def score_text(score: Mapping[str, Any] | None) -> str:
    """A figure and the wider half of its 95% interval: ``51.2 ±2.7`` in percent, ``2.34 ±0.05``."""
    if score is None or score["value"] is None:
        return "not run"
    value = score["value"]
    scale, digits = (100, 1) if is_share(score) else (1, 3 if value < 10 else 1)
    text = f"{value * scale:.{digits}f}"
    if score.get("ci_low") is None:
        return text
    margin = max(value - score["ci_low"], score["ci_high"] - value)
    return f"{text} ±{margin * scale:.{digits}f}"


def is_share(score: Mapping[str, Any]) -> bool:
    """Whether the figure is a share, to be shown in percent."""
    return bool(score["higher_is_better"]) and 0 <= (score["value"] or 0) <= 1


def remarks(results: Results) -> list[str]:
    """Lines under the table: what did not run and why, counts, and what a reader must know."""
    first: list[Any] = next(iter(results["rows"].values()))["scores"]
    lines = list(
        dict.fromkeys(f"{s['task']}: not run, {s['skipped']}" for s in first if s["skipped"])
    )
    ran = [s for s in first if not s["skipped"]]
    if ran:
        counted = {s["task"]: s["samples"] for s in ran}
        lines.append("documents: " + ", ".join(f"{task} {n}" for task, n in counted.items()))
        lines.append("±: 95% confidence; shares in percent; perplexity: lower is better")
    for label, row in results["rows"].items():
        for score in row["scores"]:
            detail = score["detail"].partition("; sandbox:")[0]
            if score["value"] is not None and detail.startswith(("best of", "mean of")):
                lines.append(f"{score['task']} {score['metric']}, {label}: {detail}")
    kept = ", ".join(f"{task} {share:.0%}" for task, share in gain_retention(results).items())
    if kept:
        lines.append(f"kept of full LoRA's gain over the base: {kept}")
    if any(row["training"] for row in results["rows"].values()):
        lines.append("training memory: peak above what was in use when training began")
    return lines


def gain_retention(results: Results) -> dict[str, float]:
    """(recovered - base) / (full LoRA - base) of each task's headline figure, as in Table 7.

    Only where full LoRA's gain lies outside both intervals' reach: a ratio of noise is no figure.
    """
    rows = results["rows"]
    if not {"base", "recovered", "full-lora"} <= set(rows):
        return {}
    shares = {}
    headline: dict[str, str] = {}
    for score in rows["base"]["scores"]:
        if not score["group"]:
            headline.setdefault(score["task"], score["metric"])
    for key in headline.items():
        base, ours, full = (_find(rows[r], key) for r in ("base", "recovered", "full-lora"))
        if not base or not ours or not full or None in (base["ci_high"], full["ci_low"]):
            continue
        if None in (base["value"], ours["value"], full["value"]) or not base["higher_is_better"]:
            continue
        if full["ci_low"] > base["ci_high"]:
            gain = full["value"] - base["value"]
            shares[key[0]] = (ours["value"] - base["value"]) / gain
    return shares


def to_markdown(results: Results) -> str:
    """The whole table in one, and its remarks."""
    columns = [*training_columns(results), *score_columns(results)]
    header = ["model", *(" ".join(column.header) for column in columns)]
    lines = [f"### {title(results)}", "", _md(header), _md(["---"] * len(header))]
    for place, label in enumerate(results["rows"]):
        lines.append(_md([label, *(column.cells[place] for column in columns)]))
    lines += ["", *(f"- {remark}" for remark in remarks(results))]
    return "\n".join(lines) + "\n"


def to_csv(results: Results) -> str:
    """One line for each row and figure, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["model", *_CSV_FIELDS])
    for label, row in results["rows"].items():
        for score in row["scores"]:
            values = (score.get(name) for name in _CSV_FIELDS)
            writer.writerow([label, *("" if value is None else value for value in values)])
    return stream.getvalue()


def _scores(results: Results) -> list[Any]:
    return [score for row in results["rows"].values() for score in row["scores"]]


def _find(row: Mapping[str, Any], key: tuple[str, str]) -> Any:
    return next((s for s in row["scores"] if (s["task"], s["metric"]) == key), None)


def _header(score: Mapping[str, Any]) -> tuple[str, ...]:
    task, metric = score["task"], score["metric"]
    if task == metric:
        return (task,)
    how = [score["variant"]] if score["variant"] else []
    if score["num_fewshot"] or score["variant"]:
        how.append(f"{score['num_fewshot']}-shot")
    return tuple(filter(None, (task, " ".join(how), _SHORT_METRICS.get(metric, metric))))


def _md(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
