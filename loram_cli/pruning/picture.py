"""A picture of what was kept of each layer."""

from collections.abc import Sequence
from pathlib import Path

from loram_cli.arch.spec import LayerGeometry
from loram_cli.figures import BLUE, GREYS, INK, RED, new_figure, plain_axes, save_figure


def draw_kept(before: Sequence[LayerGeometry], after: Sequence[LayerGeometry], path: Path) -> None:
    """Draw key/value heads and MLP channels kept per layer, over what the base has, as a PNG."""
    figure = new_figure(7.2, 4.6)
    panels = figure.subplots(2, 1, sharex=True)
    numbers = range(len(before))
    for axes, name, label, colour in (
        (panels[0], "num_key_value_heads", "key/value heads", BLUE),
        (panels[1], "intermediate_size", "MLP channels", RED),
    ):
        whole = [getattr(layer, name) for layer in before]
        kept = [getattr(layer, name) for layer in after]
        axes.bar(numbers, whole, width=0.8, color=GREYS[-1], label="dropped")
        axes.bar(numbers, kept, width=0.8, color=colour, label="kept")
        title = f"{sum(kept):,} of {sum(whole):,} {label} kept ({sum(kept) / sum(whole):.0%})"
        plain_axes(axes, title=title, ylabel=label, integers="xy")
        axes.legend(frameon=False, ncols=2, fontsize=8, loc="lower right",
                    bbox_to_anchor=(1, 0.98), borderaxespad=0)  # fmt: skip
    panels[1].set_xlabel("decoder layer", color=INK)
    panels[1].margins(x=0.02)
    save_figure(figure, path)
