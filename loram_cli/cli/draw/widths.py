"""What pruning keeps of each layer, as a table."""

from itertools import groupby

from rich import box
from rich.table import Table

from loram_cli.stages.core.results import PruneResult
from loram_cli.units import format_bytes, format_params

# Numbers of 2 bytes in 16, to which cuBLAS wants rows aligned.
_TENSOR_CORE_WIDTH = 8
_WIDE = 1024


def widths_table(result: PruneResult) -> Table:
    """What stays of each layer; layers in a row that keep alike share a line."""
    table = Table(box=box.SIMPLE_HEAD)
    experts = ("experts",) if result.experts else ()
    for name in ("layers", "attention heads", "key/value heads", "MLP channels", *experts, "kept"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    widths = [
        (result.widths[i], result.base_widths[i], result.experts.get(i))
        for i in map(str, range(len(result.base_widths)))
    ]
    first = 0
    for (kept, whole, routed), group in groupby(widths):
        last = first + len(list(group)) - 1
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            *(f"{k} of {w}" if k != w else str(k) for k, w in zip(kept, whole, strict=True)),
            *(("-" if routed is None else f"{routed[0]} of {routed[1]}",) if experts else ()),
            _share_kept(kept, whole, routed),
        )
        first = last + 1
    return table


def _share_kept(
    kept: tuple[int, ...], whole: tuple[int, ...], routed: tuple[int, ...] | None
) -> str:
    """What stays of a layer, in a few words."""
    if kept == whole and routed is None:
        return "whole"
    shares = [f"{routed[0] / routed[1]:.0%} experts"] if routed else []
    if kept != whole:
        shares = [f"{kept[1] / whole[1]:.0%} heads", f"{kept[2] / whole[2]:.0%} MLP", *shares]
    return ", ".join(shares)


def width_advice(result: PruneResult) -> list[str]:
    """Lines where the ratio is too low for any head, or leaves MLPs of a slow width."""
    return _whole_heads(result) + _slow_width(result)


def _whole_heads(result: PruneResult) -> list[str]:
    """Query heads go with the key/value head that they share: of few, a ratio may leave all."""
    if result.ratio is None or result.scope != "layer":
        return []
    pruned = [
        kept[1]
        for i, kept in result.widths.items()
        if kept != result.base_widths[i] and kept[1] and kept[1] == result.base_widths[i][1]
    ]
    if not pruned or max(pruned) * result.ratio >= 1:
        return []
    heads = f"{pruned[0]} key/value head{'s' if pruned[0] > 1 else ''}"
    return [
        f"all attention heads stay: {result.ratio:g} of {heads} is less than one, and query heads "
        "go with theirs; MLP channels alone are dropped"
    ]


def _slow_width(result: PruneResult) -> list[str]:
    slow = [
        kept[2]
        for i, kept in result.widths.items()
        if kept[2] % _TENSOR_CORE_WIDTH and not result.base_widths[i][2] % _TENSOR_CORE_WIDTH
    ]
    # Of small matrices a GPU's time is not the multiplication.
    if max(slow, default=0) < _WIDE:
        return []
    return [
        f"{slow[0]} MLP channels are no multiple of {_TENSOR_CORE_WIDTH}, which keeps a GPU from "
        "its fastest kernels; --multiple-of 64 rounds up"
    ]


def widths_remarks(result: PruneResult) -> list[str]:
    """Lines under the table: where the widths come from, and what they do not tell."""
    remarks = []
    if result.ratio is not None and result.scope == "layer":
        remarks.append(f"ratio {result.ratio:g} of the groups of each pruned layer")
    if result.scope == "global":
        remarks.append(
            f"--scope global: {format_params(result.remove_params or 0)} parameters will go; how "
            "the layers share them is known after ranking, shown is the even share"
        )
    if result.experts_ratio is not None:
        remarks.append(f"ratio {result.experts_ratio:g} of the experts of each layer that has them")
    if result.card_bytes is not None:
        remarks.append(
            f"LoRA training wants a card of {format_bytes(result.card_bytes)}, with its usual "
            "reserve"
        )
    return remarks + width_advice(result)


def prune_line(result: PruneResult) -> str:
    """What is left after pruning, by plan or by count."""
    left, share = format_params(result.pruned_params), result.removed_share
    on_disk = format_bytes(result.weight_bytes)
    if result.bits is not None:
        on = " on a trellis" if result.codes == "trellis" else ""
        return (
            f"{left} parameters, those of the decoder linears in {result.bits} bits{on} (groups of "
            f"{result.group_size}): {on_disk} on disk; shapes stay, so that an adapter is "
            "recovered as it is"
        )
    if result.sparsity:
        return (
            f"{left} parameters that are not zero ({share:.1%} of all zeroed); "
            f"zeros take their place: {on_disk} on disk and in memory, as before"
        )
    return (
        f"{left} parameters: {result.reduction:.2f}x smaller "
        f"({share:.1%} of all parameters removed), {on_disk} on disk"
    )
