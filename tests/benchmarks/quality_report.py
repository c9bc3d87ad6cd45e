"""Table and picture of a quality benchmark's rows."""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
_FULL, _SMALL = "#2f5d8a", "#c8553d"
# The paper's Table 7; below the lowest share a mark points to the left.
_GOAL, _LOWEST = 0.93, -0.5


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
    """Retention of every way, on the full model and on the small one that was trained.

    Ways are sorted by the weights that training holds, each at its own height.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = ["loss_retention", "exact_retention"]
    figures = [f for f in figures if any(row[f] is not None for row in groups.values())]
    rows = [row for row in groups.values() if row["row"] not in ("base", "full")]
    if not figures or not rows:
        return
    ways = sorted({_way(row) for row in rows}, reverse=True)
    figure = Figure((4 + 4 * len(figures), 1.4 + 0.32 * len(ways)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for axes, kind in zip(every, figures, strict=True):
        for share, style in ((1.0, "-"), (_GOAL, ":"), (0.0, "-")):
            axes.axvline(share, color="#bbbbbb", linewidth=0.8, linestyle=style, zorder=0)
        for row in rows:
            if row[kind] is None:
                continue
            small = row["row"] == "small"
            height, value = ways.index(_way(row)), max(row[kind], _LOWEST)
            axes.plot(
                value, height, color=_SMALL if small else _FULL,
                marker="<" if value > row[kind] else "o", linestyle="none",
                markerfacecolor="white" if small else _FULL,
            )  # fmt: skip
            spread = row[f"{kind}_spread"]
            if spread is not None and not small:
                axes.hlines(height, value - spread, value + spread, color=_FULL, linewidth=1.2)
        axes.set_xlim(_LOWEST - 0.05, 1.08)
        axes.set_title("held-out loss" if kind.startswith("loss") else "exact match", loc="left")
        axes.set_xlabel("share of full LoRA's gain")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    every[0].set_yticks(range(len(ways)), [_label(way) for way in ways], fontsize=8)
    handles = [
        every[0].plot([], [], "o", color=_FULL, label="recovered, on the full model")[0],
        every[0].plot(
            [], [], "o", color=_SMALL, markerfacecolor="white", label="not recovered, small model"
        )[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(file)


def _way(row: Row) -> tuple[int, str, float, str, str]:
    aligned = "+".join(row["method"]) or "not aligned"
    quantized = ", NF4" if row["quantize"] else ""
    return row["weight_bytes"], row["strategy"], row["ratio"], aligned, quantized


def _label(way: tuple[int, str, float, str, str]) -> str:
    weight_bytes, strategy, ratio, aligned, quantized = way
    return f"{strategy} {ratio:g}, {aligned}{quantized}   {weight_bytes / 2**20:.2f} MiB"
