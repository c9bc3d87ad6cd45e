"""Draws what a directory is: stage, base, widths per layer, spec and results."""

from collections.abc import Iterator
from typing import Any

from loram_cli.tools.inspect import Inspection, LayerWidth
from loram_cli.units import format_bytes, format_params

_BAR_CELLS = 40
# Up to here every layer has a line of its own.
_SINGLE_LAYERS = 16
# Figures too long for a line, or shown otherwise.
_UNSHOWN = ("widths", "pruned_layers", "rows", "targets", "training")


def lines(found: Inspection) -> Iterator[str]:
    """The description, line by line."""
    made = f", made by '{found.stage}' of loram {found.made_with}" if found.stage else ""
    kind = f"{found.family} {found.kind}" if found.family else found.kind
    yield f"{found.directory}: {kind}{made}"
    if found.base:
        yield f"  base      {found.base}"
    if found.params is not None and found.weight_bytes is not None:
        yield (
            f"  weights   {format_params(found.params)} parameters, "
            f"{format_bytes(found.weight_bytes)}, {'/'.join(found.dtypes)}"
        )
    if found.adapter:
        yield f"  adapter   {_words(found.adapter)}"
    if found.spec:
        yield f"  spec      {_words(found.spec)}"
    if found.results:
        yield f"  results   {_words(found.results)}"
    yield from layer_lines(found.layers)
    for output in found.outputs:
        yield ""
        yield from lines(output)


def layer_lines(layers: tuple[LayerWidth, ...]) -> Iterator[str]:
    """A bar as long as a layer's share of the widest one; like neighbours of a deep model share."""
    if not layers:
        return
    yield "  layer  width of its linear modules, against the widest layer"
    for first, last in _alike(layers, together=len(layers) > _SINGLE_LAYERS):
        filled = round(first.kept_share * _BAR_CELLS)
        bar = "█" * filled + "░" * (_BAR_CELLS - filled)
        name = str(first.layer) if first is last else f"{first.layer}-{last.layer}"
        yield (
            f"  {name:>5}  {bar} {first.kept_share:>4.0%}  "
            f"{first.num_attention_heads}/{first.num_key_value_heads} heads, "
            f"{first.intermediate_size} channels"
        )


def _alike(
    layers: tuple[LayerWidth, ...], *, together: bool
) -> list[tuple[LayerWidth, LayerWidth]]:
    """First and last layer of every stretch of equal widths."""
    stretches: list[tuple[LayerWidth, LayerWidth]] = []
    for layer in layers:
        if together and stretches and _widths(stretches[-1][1]) == _widths(layer):
            stretches[-1] = (stretches[-1][0], layer)
        else:
            stretches.append((layer, layer))
    return stretches


def _widths(layer: LayerWidth) -> tuple[int, int, int]:
    return layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size


def _words(values: Any) -> str:
    shown = {k: v for k, v in values.items() if v not in (None, "", [], {}) and k not in _UNSHOWN}
    return " ".join(f"{key}={_word(value)}" for key, value in shown.items())


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
