"""What pruning keeps of each layer, as a table."""

from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from loram_cli.units import format_bytes, format_params

# Numbers of 2 bytes in 16, to which cuBLAS wants rows aligned.
_TENSOR_CORE_WIDTH = 8
_WIDE = 1024


def widths_table(results: dict[str, Any]) -> Table:
    """What stays of each layer; layers in a row that keep alike share a line.

    Args:
        results: Of the plan or of the stage: ``widths`` and ``base_widths`` by layer.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("layers", "attention heads", "key/value heads", "MLP channels", "kept"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    widths = [
        (tuple(results["widths"][str(i)]), tuple(results["base_widths"][str(i)]))
        for i in range(len(results["base_widths"]))
    ]
    first = 0
    for (kept, whole), group in groupby(widths):
        last = first + len(list(group)) - 1
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            *(f"{k} of {w}" if k != w else str(k) for k, w in zip(kept, whole, strict=True)),
            "whole"
            if kept == whole
            else f"{kept[1] / whole[1]:.0%} heads, {kept[2] / whole[2]:.0%} MLP",
        )
        first = last + 1
    return table


def width_advice(results: dict[str, Any]) -> list[str]:
    """A line where pruning left MLPs of a width that GPUs multiply slowly.

    Args:
        results: Of the plan or of the stage.
    """
    slow = [
        kept[2]
        for i, kept in results["widths"].items()
        if kept[2] % _TENSOR_CORE_WIDTH and not results["base_widths"][i][2] % _TENSOR_CORE_WIDTH
    ]
    # Of small matrices a GPU's time is not the multiplication.
    if max(slow, default=0) < _WIDE:
        return []
    return [
        f"{slow[0]} MLP channels are no multiple of {_TENSOR_CORE_WIDTH}, which keeps a GPU from "
        "its fastest kernels; --multiple-of 64 rounds up"
    ]


def widths_remarks(results: dict[str, Any]) -> list[str]:
    """Lines under the table: where the widths come from, and what they do not tell."""
    remarks = []
    if results["ratio"] is not None and results["scope"] == "layer":
        remarks.append(f"ratio {results['ratio']:g} of the groups of each pruned layer")
    if results["scope"] == "global":
        remarks.append(
            f"--scope global: {format_params(results['remove_params'])} parameters will go; how "
            "the layers share them is known after ranking, shown is the even share"
        )
    if results["card_bytes"] is not None:
        remarks.append(
            f"LoRA training wants a card of {format_bytes(results['card_bytes'])}, with its usual "
            "reserve"
        )
    return remarks + width_advice(results)
