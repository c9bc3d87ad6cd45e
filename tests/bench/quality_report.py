"""Table and picture of a quality benchmark's rows."""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
_COLOURS = ["#333333", "#c8553d", "#4878a8", "#5b8c5a", "#8a6bb1", "#c9963b", "#4aa3a2", "#a05a78"]


def write_report(rows: list[Row], out: Path) -> str:
    """Write ``table.md`` and ``retention.png``; the table's text."""
    groups = _grouped(rows)
    text = _table(groups)
    (out / "table.md").write_text(text + "\n", "utf-8")
    _draw(groups, out / "retention.png")
    return text


def _name(row: Row) -> str:
    if row["row"] in ("base", "full"):
        return "base" if row["row"] == "base" else "full LoRA"
    aligned = "+".join(row["method"]) or "not aligned"
    kind = "Q" if row["quantize"] else ""
    tail = ", not recovered" if row["row"] == "small" else ""
    return f"{kind}LoRAM {row['strategy']} {row['ratio']:g}, {aligned}{tail}"


def _grouped(rows: list[Row]) -> dict[str, Row]:
    """Rows of the same kind over seeds, with their retention per seed."""
    ends = {(row["seed"], row["row"]): row for row in rows if row["row"] in ("base", "full")}
    lists: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        base, full = (ends.get((row["seed"], end)) for end in ("base", "full"))
        kept = {}
        for figure in ("loss", "exact"):
            values = [r.get(figure) if r else None for r in (row, base, full)]
            gain = None if None in values else values[2] - values[1]
            kept[f"{figure}_retention"] = (values[0] - values[1]) / gain if gain else None
        lists[_name(row)].append({**row, **kept})
    return {name: _merged(found) for name, found in lists.items()}


def _merged(found: list[Row]) -> Row:
    merged = {**found[0], "seeds": len(found)}
    for figure in ("loss", "exact", "loss_retention", "exact_retention", "align_eval_loss"):
        values = [row[figure] for row in found if row.get(figure) is not None]
        merged[figure] = mean(values) if values else None
        merged[f"{figure}_spread"] = stdev(values) if len(values) > 1 else None
    for figure in ("gradient_cosines", "update_cosines"):
        values = [row[figure]["all"] for row in found if figure in row]
        merged[figure] = mean(values) if values else None
    return merged


def _table(groups: dict[str, Row]) -> str:
    heads = (
        "row", "seeds", "params trained on", "weights MiB", "align s", "aligned text loss",
        "loss", "kept of gain", "exact", "kept of gain", "gradient cosine", "update cosine",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, row in groups.items():
        lines.append(
            "| " + " | ".join((
                name, str(row["seeds"]),
                "-" if row["row"] == "base" else f"{row['trained_on_params'] / 1e6:.3f}M",
                "-" if row["row"] == "base" else f"{row['weight_bytes'] / 2**20:.2f}",
                f"{row['align_seconds']:.0f}" if row["method"] else "-",
                _figure(row, "align_eval_loss"), _figure(row, "loss"),
                _figure(row, "loss_retention"), _figure(row, "exact"),
                _figure(row, "exact_retention"), _plain(row["gradient_cosines"]),
                _plain(row["update_cosines"]),
            )) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def _figure(row: Row, name: str) -> str:
    value, spread = row[name], row[f"{name}_spread"]
    return _plain(value) + (f" ±{spread:.3f}" if value is not None and spread is not None else "")


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _draw(groups: dict[str, Row], file: Path) -> None:
    """Retention against parameters trained on; a line for each way to align."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = ["loss_retention", "exact_retention"]
    figures = [f for f in figures if any(row[f] is not None for row in groups.values())]
    if not figures:
        return
    figure = Figure(figsize=(6.4 * len(figures), 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for i, kind in enumerate(figures):
        axes = figure.add_subplot(1, len(figures), i + 1)
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in groups.values():
            if row["row"] in ("base", "full") or row[kind] is None:
                continue
            aligned = "+".join(row["method"]) or "not aligned"
            label = f"{row['strategy']}, {aligned}"
            if row["row"] == "small":
                label = f"{row['strategy']}, not recovered (best)"
            label = f"{label}, NF4" if row["quantize"] else label
            lines[label].append((row["weight_bytes"] / 2**20, row[kind]))
        for number, (label, points) in enumerate(sorted(lines.items())):
            if "(best)" in label:
                best: dict[float, float] = {}
                for x, y in points:
                    best[x] = max(y, best.get(x, y))
                points = list(best.items())
            axes.plot(
                *zip(*sorted(points), strict=True), label=label, marker="o",
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=":" if "(best)" in label else "-" if "stru" in label else "--",
            )  # fmt: skip
        axes.axhline(1, color="#999999", linewidth=0.8)
        axes.axhline(0.93, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=max(-0.5, min(y for p in lines.values() for _, y in p) - 0.05))
        axes.set_xlabel("weights while training (MiB; bf16, or NF4)")
        axes.set_ylabel("share of full LoRA's gain")
        axes.set_title("held-out loss" if kind.startswith("loss") else "exact match", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if i == 0:
            axes.legend(fontsize=7, frameon=False)
    figure.savefig(file)
