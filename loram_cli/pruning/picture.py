"""A picture of what was kept of each layer."""

from collections.abc import Sequence
from pathlib import Path

from loram_cli.arch.spec import LayerGeometry

_HEADS_COLOUR, _MLP_COLOUR, _DROPPED_COLOUR, _INK = "#4878a8", "#c8553d", "#e8e8e8", "#333333"


def draw_kept(before: Sequence[LayerGeometry], after: Sequence[LayerGeometry], path: Path) -> None:
    """Draw key/value heads and MLP channels kept per layer, over what the base has, as a PNG.

    Args:
        before: Widths of every layer of the base.
        after: Widths of every layer of the pruned model.
        path: The picture's file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Figure without pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    numbers = range(len(before))
    for axes, name, label, colour in (
        (panels[0], "num_key_value_heads", "key/value heads", _HEADS_COLOUR),
        (panels[1], "intermediate_size", "MLP channels", _MLP_COLOUR),
    ):
        whole = [getattr(layer, name) for layer in before]
        kept = [getattr(layer, name) for layer in after]
        axes.bar(numbers, whole, width=0.8, color=_DROPPED_COLOUR, label="dropped")
        axes.bar(numbers, kept, width=0.8, color=colour, label="kept")
        axes.set_ylabel(label, color=_INK)
        axes.set_title(
            f"{sum(kept):,} of {sum(whole):,} {label} kept ({sum(kept) / sum(whole):.0%})",
            loc="left", fontsize=10, color=_INK,
        )  # fmt: skip
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2, fontsize=8, loc="lower right",
                    bbox_to_anchor=(1, 0.98), borderaxespad=0)  # fmt: skip
    panels[1].set_xlabel("decoder layer", color=_INK)
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].margins(x=0.02)
    # Without the library's version in the file, the same widths give the same bytes.
    figure.savefig(path, metadata={"Software": None})
