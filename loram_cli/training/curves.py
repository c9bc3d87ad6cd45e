"""Loss curves as CSV and as a picture."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError
from loram_cli.figures import BLUE, GREEN, INK, RED, figure_svg, new_figure, plain_axes, save_figure
from loram_cli.training.loop.options import LossRow, Split

_COLUMNS = ("step", "split", "loss", "learning_rate")
# The figure that shows best how an objective beyond supervised tuning goes, and its axis.
_SHOWN = {"reward": "mean reward", "reward_accuracy": "preference accuracy"}
# From this many points on a smoothed line is drawn over the raw one.
_SMOOTH_FROM = 30
# What is measured on held-out data: the model that is trained, and the full one.
_HELD_OUT = (("eval", "eval", RED), ("recovered", "eval on the full model", GREEN))


def write_curve_csv(rows: Iterable[LossRow], path: Path) -> None:
    """One line per point: step, split, loss, learning rate, and the objective's own figures."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS, *names])
        for row in rows:
            rate = "" if row.learning_rate is None else f"{row.learning_rate:.6g}"
            more = [f"{row.figures[name]:.6f}" if name in row.figures else "" for name in names]
            writer.writerow([row.step, row.split, f"{row.loss:.6f}", rate, *more])


def read_curve_csv(path: Path) -> list[LossRow]:
    """The curve that :func:`write_curve_csv` wrote.

    Raises:
        LoramError: The file is absent or not such a curve.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                LossRow(
                    int(row["step"]),
                    _split(row["split"]),
                    float(row["loss"]),
                    float(row["learning_rate"]) if row["learning_rate"] else None,
                    {n: float(v) for n, v in row.items() if n not in _COLUMNS and v},
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoramError(f"{path}: not a loss curve ({error})") from error


def _split(name: str) -> Split:
    """A split's name, as older curves and newer ones have it."""
    return "eval" if name == "eval" else "recovered" if name == "recovered" else "train"


def draw_curve(rows: Sequence[LossRow], path: Path, title: str) -> None:
    """Draw training and evaluation loss over steps as a PNG."""
    save_figure(_figure(rows, title), path)


def curve_svg(rows: Sequence[LossRow], title: str, salt: str) -> str:
    """The same picture as an ``<svg>`` element, for a page.

    Args:
        rows: The curve.
        title: What was trained.
        salt: Makes the element ids of two pictures on a page differ.
    """
    return figure_svg(_figure(rows, title), salt)


def _figure(rows: Sequence[LossRow], title: str) -> Any:
    shown = next((name for name in _SHOWN if any(name in row.figures for row in rows)), None)
    figure = new_figure(7.2, 4.2 if shown is None else 6.6)
    panels = [("loss" if shown else "loss (nats per token)", [(r, r.loss) for r in rows])]
    if shown is not None:
        points = [(row, row.figures[shown]) for row in rows if shown in row.figures]
        # What is to rise stands above what is to fall.
        panels.insert(0, (_SHOWN[shown], points))
    for i, (label, points) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        _draw_panel(axes, points)
        heading = title if i == 0 else None
        plain_axes(axes, ylabel=label, grid="y", integers="x", title=heading, title_size=11)
    axes.set_xlabel("optimizer step", color=INK)
    return figure


def _draw_panel(axes: Any, points: Sequence[tuple[LossRow, float]]) -> None:
    train = [(row.step, value) for row, value in points if row.split == "train"]
    if len(train) >= _SMOOTH_FROM:
        axes.plot(*zip(*train, strict=True), color=BLUE, alpha=0.25, linewidth=1)
        axes.plot(*zip(*_smoothed(train), strict=True), color=BLUE, linewidth=1.8,
                  label="train (smoothed)")  # fmt: skip
    elif train:
        axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=1.8, label="train")
    for split, label, color in _HELD_OUT:
        held_out = [(row.step, value) for row, value in points if row.split == split]
        if not held_out:
            continue
        # A line between only start and end would show a course that nobody measured.
        style = {"linestyle": "-" if len(held_out) > 2 else "none", "markersize": 6}
        last = f"{label} (last {held_out[-1][1]:.3f})"
        axes.plot(*zip(*held_out, strict=True), color=color, linewidth=1.8, marker="o",
                  label=last, **style)  # fmt: skip
    axes.margins(x=0.02)
    axes.legend(frameon=False)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean over a window of a fifteenth of the curve, centred, shorter at both ends."""
    half = max(1, len(points) // 30)
    smooth = []
    for i, (step, _) in enumerate(points):
        # As many points on either side, so that an end is not drawn towards the middle.
        reach = min(half, i, len(points) - 1 - i)
        window = [loss for _, loss in points[i - reach : i + reach + 1]]
        smooth.append((step, sum(window) / len(window)))
    return smooth
