"""Strategy ``depth``: whole decoder layers go, those that change their input least.

A layer's influence is one minus the mean cosine between what goes into it and what comes out
(ShortGPT, arXiv 2403.03853, "block influence"). What is left is an ordinary, shorter checkpoint.
"""

from collections.abc import Mapping
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.errors import UsageError
from loram_cli.pruning.plan import pruned_layers
from loram_cli.pruning.strategy import Strategy

_EPSILON = 1e-9


def without_last(num_layers: int, ratio: float, keep_first: int, keep_last: int) -> tuple[int, ...]:
    """Indices of as many layers as will stay; which they are is known after ranking.

    Args:
        num_layers: Of the model.
        ratio: Share of the layers between the first and the last few that goes.
        keep_first: Layers at the input side that stay.
        keep_last: Layers at the output side that stay.

    Raises:
        UsageError: The ratio is less than one layer.
    """
    candidates = pruned_layers(num_layers, keep_first, keep_last)
    drop = int(len(candidates) * ratio + _EPSILON)
    if drop < 1:
        raise UsageError(
            f"--ratio {ratio:g} of {len(candidates)} layers is less than one layer",
            "pass a higher --ratio, or lower --keep-first and --keep-last",
        )
    return tuple(i for i in range(num_layers) if i not in candidates[len(candidates) - drop :])


def keep_influential(influence: Mapping[int, float], drop: int, num_layers: int) -> tuple[int, ...]:
    """Indices of the layers that stay, in order; ties drop the later layer.

    Args:
        influence: By the index of every layer that may go.
        drop: How many go.
        num_layers: Of the model.
    """
    ranked = sorted(influence, key=lambda i: (influence[i], -i))
    gone = set(ranked[:drop])
    return tuple(i for i in range(num_layers) if i not in gone)


def shorter_config(
    family: Family, config: Mapping[str, Any], kept: tuple[int, ...]
) -> dict[str, Any]:
    """The config of a model with some of the layers.

    Lists with an entry a layer keep those of the kept layers; so does a text that spells the
    layers' kinds. Places of layers of a kind are counted anew.

    Args:
        family: Of the model.
        config: The base's ``config.json``.
        kept: Indices of the layers that stay, in order.

    Raises:
        UsageError: Kinds of layers follow from their places, and would be others.
    """
    before = family.geometry(config).layers
    spelled = family.layer_kinds.keys if family.layer_kinds is not None else ()
    shorter: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == len(before):
            shorter[key] = [value[i] for i in kept]
        elif isinstance(value, str) and key in spelled and len(value) == len(before):
            shorter[key] = "".join(value[i] for i in kept)
        else:
            shorter[key] = value
    shorter |= _moved_kinds(family, config, kept)
    name = family.config_keys.get("num_hidden_layers", "num_hidden_layers")
    if name in config:
        shorter[name] = len(kept)
    after = family.geometry(shorter).layers
    if [layer.kind for layer in after] != [before[i].kind for i in kept]:
        raise UsageError(
            f"--strategy depth: the family {family.family} tells the kind of a layer by its place, "
            "and those that stay would be taken for others",
            "pass --strategy stru, or another --keep-first",
        )
    return shorter


def _moved_kinds(
    family: Family, config: Mapping[str, Any], kept: tuple[int, ...]
) -> dict[str, Any]:
    """Config keys that tell kinds of layers by their places, for the places after the drop."""
    kinds, full = family.layer_kinds, family.full_config(config)
    moved: dict[str, Any] = {}
    if kinds is None:
        return moved
    first, last, but = (
        full.get(key) if key else None for key in (kinds.first, kinds.last, kinds.but)
    )
    if kinds.first and first is not None:
        moved[kinds.first] = sum(i < first for i in kept)
    if kinds.last and last is not None and last >= 0:
        moved[kinds.last] = sum(i <= last for i in kept) - 1
    if kinds.but and but is not None:
        moved[kinds.but] = [place for place, i in enumerate(kept) if i in but]
    return moved


def shorter_names(family: Family, names: list[str], kept: tuple[int, ...]) -> dict[str, str]:
    """The base's tensor names by those of the shorter model, in the base's order.

    Args:
        family: Of the model.
        names: Of the base's tensors.
        kept: Indices of the layers that stay, in order.
    """
    place = {f"{family.layer_prefix(i)}": family.layer_prefix(j) for j, i in enumerate(kept)}
    layers = f"{family.layers}."
    found = {}
    for name in names:
        if not name.startswith(layers):
            found[name] = name
            continue
        index = name[len(layers) :].partition(".")[0]
        prefix = f"{layers}{index}."
        if prefix in place:
            found[place[prefix] + name[len(prefix) :]] = name
    return found


STRATEGY = Strategy(
    summary="whole layers, by how little they change their input",
    ratio=0.5,
    paper_ratios=(0.25, 0.5),
    importances=("cosine",),
    drops_layers=True,
)
