"""The comparison as a picture: one panel for each task, one point with its interval per model."""

from pathlib import Path
from typing import Any

from loram_cli.evaluation.comparison import is_share, title
from loram_cli.evaluation.requests import TaskScore
from loram_cli.evaluation.results import EvalResult
from loram_cli.figures import BLUE, INK, RED, new_figure, plain_axes, save_figure

_MOST_PANELS = 12


def draw_comparison(result: EvalResult, path: Path) -> bool:
    """Draw the headline figure of every task as a PNG.

    Returns:
        Whether there was anything to draw.
    """
    panels = _panels(result)[:_MOST_PANELS]
    if not panels:
        return False
    labels = list(result.rows)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(1.6 + 3.0 * across, 0.9 + down * (0.9 + 0.36 * len(labels)))
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, labels)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    heading = f"{title(result)}\nbars: 95% confidence"
    figure.suptitle(heading[0].upper() + heading[1:], x=0.01, ha="left", fontsize=9, color=INK)
    save_figure(figure, path)
    return True


def _panels(result: EvalResult) -> list[list[TaskScore | None]]:
    """For each task the headline score of every row (None where it did not run)."""
    headline: dict[str, str] = {}
    for score in result.scores():
        if score.value is not None:
            headline.setdefault(score.task, score.metric)
    return [[row.find(*key) for row in result.rows.values()] for key in headline.items()]


def _draw_panel(axes: Any, panel: list[TaskScore | None], labels: list[str]) -> None:
    first = next(score for score in panel if score is not None)
    scale = 100 if is_share(first) else 1
    better = max if first.higher_is_better else min
    values = [s.value for s in panel if s is not None and s.value is not None]
    for place, score in enumerate(panel):
        if score is None or score.value is None:
            continue
        value = score.value * scale
        colour = RED if score.value == better(values) else BLUE
        if score.ci_low is not None and score.ci_high is not None:
            low, high = score.ci_low * scale, score.ci_high * scale
            axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.45)
        axes.plot([value], [place], marker="o", markersize=6, color=colour, linestyle="none")
        text = (
            f"{value:.1f}" if scale == 100 else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        )
        axes.annotate(
            text, (value, place), textcoords="offset points", xytext=(0, 6), ha="center",
            fontsize=7, color=INK,
        )  # fmt: skip
    spread = max(values) / max(min(values), 1e-9)
    if scale == 1 and spread > 20:
        axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.7)
    shots = f", {first.num_fewshot}-shot" if first.num_fewshot else ""
    task, metric = first.task, first.metric.partition(",")[0]
    name = task if task == metric else f"{task} {metric}"
    direction = "higher is better" if first.higher_is_better else "lower is better"
    axes.set_xlabel(("%, " if scale == 100 else "") + direction, fontsize=7, color=INK)
    hidden = ("top", "right", "left")
    plain_axes(axes, title=f"{name}{shots}", title_size=8.5, grid="x", hidden=hidden)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.14)
