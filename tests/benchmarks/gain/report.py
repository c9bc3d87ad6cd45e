"""The bench's table, and its picture: gain kept against bytes held.

The product's page has a table for each base, between marks with its name. A machine that measures
some rows of a base puts them in, and leaves those that were measured elsewhere.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from gain.rows import FULL, ROWS

Figures = Mapping[str, Any]

# A row of the table: its cells by column.
Cells = dict[str, str]
# Left, bottom, right, top, in the picture's units.
_Box = tuple[float, float, float, float]

_BLOCK = re.compile(
    r"(?P<begin><!-- bench-gain (?P<base>\S+) -->\n)(?P<table>.*?)(?P<end>\n?<!-- /bench-gain -->)",
    re.DOTALL,
)
_FIRST, _BASE, _FULL = "small model", "base", "full LoRA"
_TOP = 1.08  # of the picture, in shares kept
_LEAST = 0.07  # of the bytes, at the picture's left
_SHARES = (0.1, 0.14, 0.2, 0.3, 0.5, 0.7, 1)
_EXACT = re.compile(r"\+ (\d+) exact")
_HEADER = (
    "small model", "bytes", "peak", "align", "train", "align tokens", "before", "small",
    "recovered", "scale", "scaled", "kept", "text ppl",
)  # fmt: skip


def write_report(done: Mapping[str, Figures], base: str, out: Path, *, docs: bool = False) -> str:
    """Write the table and the picture of all rows that are done.

    Args:
        done: Figures by row and seed.
        base: Name of the model that was measured.
        out: ``table.md`` and ``gain.png`` go there; with ``docs`` the rows go into the table of
            ``gain.md`` that is the base's, and the picture is that of all tables there.
        docs: Whether the folder is that of the product's pages.

    Returns:
        The table.

    Raises:
        SystemExit: The page has no table for the base.
    """
    rows = cells(merged(done))
    if not docs:
        text = table(rows)
        (out / "table.md").write_text(text + "\n", "utf-8")
        draw({base: rows}, out / "gain.png")
        return text
    page = out / "gain.md"
    text = page.read_text("utf-8")
    tables = {block["base"]: parsed(block["table"]) for block in _BLOCK.finditer(text)}
    if base not in tables:
        raise SystemExit(f"{page}: no table between marks of {base} (--base-name)")
    tables[base] = _ordered({row[_FIRST]: row for row in (*tables[base], *rows)})

    def written(block: re.Match[str]) -> str:
        return block["begin"] + table(tables[block["base"]]) + "\n" + block["end"].lstrip("\n")

    page.write_text(_BLOCK.sub(written, text), "utf-8")
    draw(tables, out / "gain.png")
    return table(tables[base])


def parsed(text: str) -> list[Cells]:
    """The rows of a table as :func:`table` writes it."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]] if lines else []


def _ordered(rows: Mapping[str, Cells]) -> list[Cells]:
    """Rows by label in the bench's order; those that it has no more come last."""
    order = [_BASE, _FULL, *(row.label for row in ROWS)]
    return sorted(rows.values(), key=lambda row: [*order, row[_FIRST]].index(row[_FIRST]))


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


def cells(rows: Iterable[Figures]) -> list[Cells]:
    """What the table says of each row."""
    found = []
    for row in rows:
        if row["name"] == FULL:
            base = {"before": f"{row['loss_base']:.3f}", "text ppl": f"{row['ppl_base']:.1f}"}
            found.append({_FIRST: _BASE, **base})
        found.append(_cells(row))
    return found


def table(rows: Iterable[Cells]) -> str:
    """The rows in Markdown, with a column for each count of exact steps."""
    rows = list(rows)
    exact = {name for row in rows for name in row if _EXACT.fullmatch(name)}
    header = [*_HEADER, *sorted(exact, key=lambda name: int(name.split()[1]))]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join([*lines, *(_line(row.get(name, "") for name in header) for row in rows)])


def _cells(row: Figures) -> Cells:
    kept = f"{row['kept']:.2f}"
    if row["seeds"] > 1:
        kept += f" ±{row['spread'] / 2:.2f}"
    full = row["name"] == FULL
    values = (
        _FULL if full else row["label"],
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
    )
    steps = (name.removeprefix("kept_") for name in row if name.startswith("kept_"))
    exact = {f"+ {count} exact": f"{row[f'kept_{count}']:.2f}" for count in steps}
    return dict(zip(_HEADER, values, strict=True)) | exact


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} s"


def _thousands(value: float | None) -> str:
    return "" if value is None else f"{value / 1000:.0f}k"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(tables: Mapping[str, Iterable[Cells]], file: Path) -> None:
    """Gain kept against bytes held, by base; the frontier of each is joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    taken: list[_Box] = []
    named: list[tuple[float, float, str, str]] = []
    short = {_FULL: FULL} | {row.label: row.name for row in ROWS}
    colours = ("#c8553d", "#2f5d8a", "#4f772d", "#6d597a")
    for (base, rows), colour in zip(tables.items(), colours, strict=False):
        points = [
            (
                _across(float(row["bytes"])),
                float(row["kept"].split()[0]),
                short.get(row[_FIRST], ""),
            )
            for row in rows
            if row.get("kept")
        ]
        frontier, best = [], -math.inf
        for held, kept, _ in sorted(points, key=lambda point: (point[0], -point[1])):
            if kept > best:
                best = kept
                frontier.append((held, kept))
        axes.plot(*zip(*frontier, strict=True), color=colour, linewidth=1, zorder=1, label=base)
        taken += [box for pair in pairwise(frontier) for box in _along(*pair)]
        for held, kept, name in points:
            axes.scatter(held, kept, color=colour, s=22, zorder=2)
            taken.append((held - 0.007, kept - 0.009, held + 0.007, kept + 0.009))
            named.append((held, kept, name, colour))
    for held, kept, name, colour in sorted(named, key=lambda one: -one[1]):
        box = _free_place(held, kept, name, taken)
        taken.append(box)
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
        at, side = (box[0], "left") if box[0] > held else (box[2], "right")
        axes.annotate(
            name, (held, kept), (at, (box[1] + box[3]) / 2), fontsize=7, color=colour,
            ha=side, va="center", arrowprops=leader,
        )  # fmt: skip
    axes.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
    # Room for names to the right of their points.
    axes.set_xlim(0, 1.15)
    axes.set_xticks([_across(share) for share in _SHARES], [f"{share:g}" for share in _SHARES])
    axes.set_ylim(0, _TOP)
    axes.set_xlabel("frozen decoder weights held while training, against bf16")
    axes.set_ylabel("share of full LoRA's gain kept")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def _across(held: float) -> float:
    """Where a share of the bytes lies in the picture: by its logarithm, as the least lie densely."""
    return math.log(held / _LEAST) / math.log(1 / _LEAST)


def _along(start: tuple[float, float], end: tuple[float, float]) -> Iterator[_Box]:
    """What a line takes."""
    for i in range(101):
        across, up = (a + (b - a) * i / 100 for a, b in zip(start, end, strict=True))
        yield across, up - 0.002, across, up + 0.002


def _free_place(held: float, kept: float, name: str, taken: list[_Box]) -> _Box:
    """The nearest place for a point's name that lies on nothing else, to its right or left."""
    wide, high = 0.0082 * len(name), 0.022
    places = (
        (left, kept - high / 2 + step * high / 2)
        for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8)
        for left in (held + 0.015, held - 0.015 - wide, held + 0.1)
    )
    boxes = [(left, low, left + wide, low + high) for left, low in places]
    inside = [box for box in boxes if box[0] > 0 and box[1] > 0 and box[3] < _TOP]
    return next((box for box in inside if not any(_overlap(box, one) for one in taken)), boxes[0])


def _overlap(one: _Box, other: _Box) -> bool:
    across = one[0] < other[2] and other[0] < one[2]
    return across and one[1] < other[3] and other[1] < one[3]
