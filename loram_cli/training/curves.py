"""The loss curve, as numbers and as a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

from loram_cli.training.loop import LossPoint


def write_curve(points: Sequence[LossPoint], directory: Path, title: str) -> None:
    """Write ``loss.csv`` (step, split, loss) and ``loss.png``.

    Args:
        points: The curve.
        directory: Where both go.
        title: Headline of the picture.
    """
    with (directory / "loss.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", "split", "loss"])
        writer.writerows([p.step, p.split, f"{p.loss:.6f}"] for p in points)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for split, style in (
        ("train", {"color": "#9db4c8"}),
        ("eval", {"color": "#c2410c", "marker": "o"}),
    ):
        chosen = [p for p in points if p.split == split]
        if chosen:
            label = "training" if split == "train" else "held out"
            axes.plot([p.step for p in chosen], [p.loss for p in chosen], label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(directory / "loss.png")
