"""Training memory as bars in a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loram_cli.errors import LoramError
from loram_cli.figures import (
    BLUE,
    GREYS,
    INK,
    LIGHT_BLUE,
    LIGHT_RED,
    RED,
    new_figure,
    plain_axes,
    save_figure,
)  # fmt: skip
from loram_cli.memory.training import CARDS_GIB, USABLE_SHARE
from loram_cli.units import GIB, common_unit

_COLOURS = (BLUE, LIGHT_BLUE, RED, LIGHT_RED, GREYS[1])


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: What it stands for.
        parts: Name and bytes of each part, from the left.
    """

    label: str
    parts: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        """Its length."""
        return sum(part_bytes for _, part_bytes in self.parts)


def draw_bars(bars: Sequence[Bar], path: Path, title: str) -> None:
    """Draw bars on one scale, with the usable memory of the common cards as lines.

    Args:
        bars: From the top; all with the same parts.
        path: The picture's file; its name says the format.
        title: Headline.

    Raises:
        LoramError: The file cannot be written, or its name ends in no known format; without an
            ending it is a PNG.
    """
    most = max(bar.total_bytes for bar in bars)
    unit, unit_bytes = common_unit(most)
    figure = new_figure(9.0, 1.7 + 0.36 * len(bars))
    axes = figure.add_subplot()
    places = range(len(bars))
    starts = [0.0] * len(bars)
    for i, (name, _) in enumerate(bars[0].parts):
        widths = [bar.parts[i][1] / unit_bytes for bar in bars]
        axes.barh(places, widths, left=starts, height=0.66, color=_COLOURS[i], label=name)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, end in zip(places, starts, strict=True):
        axes.annotate(f"{end:.1f}", (end, place), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8, color=INK,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    if unit == "GiB":
        for card in CARDS_GIB:
            if card * USABLE_SHARE <= most / GIB * 1.08:
                axes.axvline(card * USABLE_SHARE, color=GREYS[2], linewidth=0.9, linestyle=":",
                             zorder=0)  # fmt: skip
                axes.annotate(f"{card}", (card * USABLE_SHARE, 1), ha="center", fontsize=8,
                              xycoords=("data", "axes fraction"), xytext=(0, 3),
                              textcoords="offset points", color=GREYS[0])  # fmt: skip
    axes.set_yticks(places, [bar.label for bar in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, most / unit_bytes * 1.1)
    xlabel = f"{unit}; dotted: what a card of so many GB leaves usable"
    plain_axes(axes, title=title, title_pad=16, xlabel=xlabel)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    try:
        save_figure(figure, path)
    except OSError as error:
        raise LoramError(f"--plot {path}: cannot be written ({error.strerror})") from error
    except ValueError as error:
        raise LoramError(
            f"--plot {path}: '{path.suffix}' is not an image format", "name it x.png"
        ) from error
