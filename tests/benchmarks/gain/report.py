"""The bench's table, and its picture: gain kept against bytes held."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from gain.rows import FULL, ROWS

Figures = Mapping[str, Any]

_DOCS_MARKS = ("<!-- bench-gain -->", "<!-- /bench-gain -->")
_HEADER = (
    "small model", "bytes", "peak", "align", "train", "align tokens", "before", "small",
    "recovered", "scale", "scaled", "kept", "text ppl",
)  # fmt: skip


def write_report(done: Mapping[str, Figures], out: Path, *, docs: bool = False) -> str:
    """Write the table and the picture of all rows that are done.

    Args:
        done: Figures by row and seed.
        out: ``table.md`` and ``gain.png`` go there; with ``docs`` the table goes into ``gain.md``
            between its marks.
        docs: Whether the folder is that of the product's pages.

    Returns:
        The table.
    """
    rows = merged(done)
    text = table(rows)
    if docs:
        page = out / "gain.md"
        before, rest = page.read_text("utf-8").split(_DOCS_MARKS[0])
        after = rest.split(_DOCS_MARKS[1])[1]
        parts = (before, _DOCS_MARKS[0], f"\n{text}\n", _DOCS_MARKS[1], after)
        page.write_text("".join(parts), "utf-8")
    else:
        (out / "table.md").write_text(text + "\n", "utf-8")
    draw(rows, out / "gain.png")
    return text


def merged(done: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """One entry a row, in the table's order: means over its seeds, with the share kept."""
    ends = {figures["seed"]: figures for figures in done.values() if figures["name"] == FULL}
    found = []
    for row in ROWS:
        seeds = [f for f in done.values() if f["name"] == row.name and f["seed"] in ends]
        if not seeds:
            continue
        names = {name for f in seeds for name in f if isinstance(f[name], int | float)}
        entry: dict[str, Any] = {n: mean(f[n] for f in seeds if n in f) for n in names}
        entry |= {"name": row.name, "label": row.label, "seeds": len(seeds)}
        # As a user would have it: with the update scaled, where the row says so.
        best = "loss_scaled" if all("loss_scaled" in f for f in seeds) else "loss_recovered"
        shares = [_kept(f, ends[f["seed"]], f[best]) for f in seeds]
        entry["kept"], entry["spread"] = mean(shares), max(shares) - min(shares)
        for name in names:
            if name.startswith("loss_polished_"):
                steps = name.rpartition("_")[2]
                values = [_kept(f, ends[f["seed"]], f[name]) for f in seeds if name in f]
                entry[f"kept_{steps}"] = mean(values)
        found.append(entry)
    return found


def _kept(figures: Figures, full: Figures, loss: float) -> float:
    """Share of full LoRA's gain."""
    return float((full["loss_base"] - loss) / (full["loss_base"] - full["loss_recovered"]))


def table(rows: Iterable[Figures]) -> str:
    """The rows in Markdown, with a column for each count of exact steps."""
    rows = list(rows)
    counts = sorted(
        {int(n.removeprefix("kept_")) for row in rows for n in row if n.startswith("kept_")}
    )
    header = [*_HEADER, *(f"+ {count} exact" for count in counts)]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in rows:
        if row["name"] == FULL:
            lines.append(_line(_base_cells(row, len(header))))
        lines.append(_line(_cells(row, counts)))
    return "\n".join(lines)


def _base_cells(row: Figures, width: int) -> list[str]:
    cells = ["base", *[""] * (width - 1)]
    cells[_HEADER.index("before")] = f"{row['loss_base']:.3f}"
    cells[_HEADER.index("text ppl")] = f"{row['ppl_base']:.1f}"
    return cells


def _cells(row: Figures, counts: list[int]) -> list[str]:
    kept = f"{row['kept']:.2f}"
    if row["seeds"] > 1:
        kept += f" ±{row['spread'] / 2:.2f}"
    full = row["name"] == FULL
    return [
        "full LoRA" if full else row["label"],
        f"{row['bytes']:.2f}",
        f"{row['predicted_peak_bytes'] / 2**30:.2f} GiB",
        _seconds(row.get("align_seconds")),
        _seconds(row["train_seconds"]),
        _thousands(row.get("align_tokens")),
        f"{row['loss_before']:.3f}",
        "" if full else f"{row['loss_small']:.3f}",
        f"{row['loss_recovered']:.3f}",
        f"{row['scale']:.2f}" if "scale" in row else "",
        f"{row['loss_scaled']:.3f}" if "loss_scaled" in row else "",
        kept,
        f"{row.get('ppl_scaled', row['ppl_recovered']):.1f}",
        *(f"{row[f'kept_{n}']:.2f}" if f"kept_{n}" in row else "" for n in counts),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} s"


def _thousands(value: float | None) -> str:
    return "" if value is None else f"{value / 1000:.0f}k"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(rows: Iterable[Figures], file: Path) -> None:
    """Gain kept against bytes held; the frontier is joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = list(rows)
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    best = -math.inf
    frontier = []
    for row in sorted(points, key=lambda row: (row["bytes"], -row["kept"])):
        if row["kept"] > best:
            best = row["kept"]
            frontier.append(row)
    axes.plot(
        [row["bytes"] for row in frontier], [row["kept"] for row in frontier],
        color="#2f5d8a", linewidth=1, zorder=1, label="frontier",
    )  # fmt: skip
    names: list[tuple[float, float]] = []
    for row in sorted(points, key=lambda row: -row["kept"]):
        axes.scatter(row["bytes"], row["kept"], color="#c8553d", s=22, zorder=2)
        place = row["bytes"] + 0.008, row["kept"] + 0.004
        # Below the name of a neighbour that it would lie on.
        for other in names:
            if abs(place[0] - other[0]) < 0.2 and other[1] - place[1] < 0.024:
                place = place[0], other[1] - 0.024
        names.append(place)
        axes.annotate(row["name"], (row["bytes"], row["kept"]), fontsize=7, xytext=place)
    axes.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
    # Names stand to the right of their points.
    axes.set_xlim(0, 1.15)
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("frozen decoder weights held while training, against bf16")
    axes.set_ylabel("share of full LoRA's gain kept")
    if frontier:
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=140)
    pyplot.close(figure)
