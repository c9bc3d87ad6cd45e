"""What all pictures share: colours, a figure without a window, plain axes, equal bytes on disk."""

import io
from pathlib import Path
from typing import Any, Literal

INK, BLUE, RED, GREEN = "#333333", "#4878a8", "#c8553d", "#4f8a5b"
LIGHT_BLUE, LIGHT_RED = "#8fb0d0", "#e3a18f"
# From dark to light.
GREYS = ("#888888", "#9a9a9a", "#bbbbbb", "#e5e5e5", "#e8e8e8")
_DPI = 150


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib ``Figure``, in inches.

    Made without pyplot: no global state, and no window system is asked for.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(
    axes: Any,
    *,
    title: str | None = None,
    title_size: float = 10,
    title_pad: float | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    grid: Literal["x", "y"] | None = None,
    hidden: tuple[str, ...] = ("top", "right"),
    integers: str = "",
) -> None:
    """Give axes the look of all pictures.

    Args:
        axes: Of matplotlib.
        title: Above them, from the left.
        title_size: Its font size.
        title_pad: Points between it and the axes; None leaves it to matplotlib.
        xlabel: Below them.
        ylabel: Beside them.
        grid: Lines across this axis, behind what is drawn.
        hidden: Edges of the frame that are left out.
        integers: Axes that have whole numbers only, such as ``xy``.
    """
    from matplotlib.ticker import MaxNLocator

    if title is not None:
        axes.set_title(title, loc="left", fontsize=title_size, color=INK, pad=title_pad)
    if xlabel is not None:
        axes.set_xlabel(xlabel, color=INK)
    if ylabel is not None:
        axes.set_ylabel(ylabel, color=INK)
    if grid is not None:
        axes.grid(axis=grid, color=GREYS[3], linewidth=0.8)
        axes.set_axisbelow(True)
    axes.spines[list(hidden)].set_visible(False)
    for name in integers:
        ticks = {"nbins": 5} if name == "y" else {}
        getattr(axes, f"{name}axis").set_major_locator(MaxNLocator(integer=True, **ticks))


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture: equal figures give equal bytes.

    Args:
        figure: From :func:`new_figure`.
        path: The file; its ending says the format, and without one it is a PNG.

    Raises:
        OSError: It cannot be written.
        ValueError: The ending is no format.
    """
    # Named, because the library adds an ending of its own to a name without one.
    ending = path.suffix.removeprefix(".").lower() or "png"
    # A PNG would otherwise name the library's version.
    figure.savefig(path, format=ending, metadata={"Software": None} if ending == "png" else None)


def figure_svg(figure: Any, salt: str) -> str:
    """A picture as an ``<svg>`` element, for a page; its text stays text.

    Args:
        figure: From :func:`new_figure`.
        salt: Makes the element ids of two pictures on a page differ.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
