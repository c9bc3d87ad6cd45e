"""What a family's experts are: which module runs them, and how published files store them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

EXPERTS_TARGET = "experts"
"""What names the experts among the LoRA targets; no module of that name has factors of its own."""

# PEFT wraps a module once for each of its parameters with factors, one wrapper in the other.
_WRAPPED = ".base_layer"


def reached_share(experts: int, top_k: int, tokens: int) -> float:
    """The share of a layer's experts that some tokens reach, were all of them as likely.

    Routers have their favourites: fewer are reached.

    Args:
        experts: How many there are.
        top_k: How many of them a token has.
        tokens: How many pass the layer together.
    """
    return 1.0 - (1.0 - top_k / experts) ** tokens


def plain_target(module: str) -> str:
    """The LoRA target behind a module's name in an adapter: the last part, or the experts'."""
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module.rpartition(".")[2]


@dataclass(frozen=True)
class AdaptedWeight:
    """The weight that a pair of LoRA factors changes.

    Attributes:
        tensor: Its full name.
        rows: Output features.
        columns: Input features.
        experts: How many experts the factors hold one after the other; 0 for a linear's.
        transposed: Whether each expert's weight has shape (columns, rows).
    """

    tensor: str
    rows: int
    columns: int
    experts: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer.

    A model in memory holds all experts of a layer in a few tensors whose first axis runs over
    them; published files may hold a tensor for each expert.

    Attributes:
        module: Name inside the layer of the module that runs them. It is called with hidden
            states of shape (tokens, hidden), and of shape (tokens, top_k) the experts of each
            token and their weights.
        parameters: Names inside the layer of its weights that can have LoRA factors.
        top_k: Config key of how many experts a token has.
        counts: Config keys that may hold how many experts there are; all that are there agree.
        groups: Config key of how many groups of equal size the router picks among; None where
            it picks among all experts.
        groups_chosen: Config key of how many of the groups a token may use.
        transposed: Whether the weights have shape (experts, in, out), not (experts, out, in).
        stored: By name inside the layer, the names of what files hold in its place, to be joined
            along the rows; a ``*`` stands for the expert's index. One name without it only
            renames the tensor.
        mxfp4: Whether published files may hold the parameters in MXFP4.
    """

    module: str
    parameters: tuple[str, ...]
    top_k: str
    counts: tuple[str, ...]
    groups: str | None = None
    groups_chosen: str | None = None
    transposed: bool = False
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mxfp4: bool = False

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Experts":
        """From the object ``experts`` of a family's file."""
        lists = {key: tuple(data[key]) for key in ("parameters", "counts")}
        stored = {name: tuple(parts) for name, parts in data.get("stored", {}).items()}
        return cls(**{**data, **lists, "stored": stored})

    @cached_property
    def factor_modules(self) -> dict[str, str]:
        """Parameters by their names in a PEFT adapter, inside the layer; the first is innermost."""
        last = len(self.parameters) - 1
        return {self.module + _WRAPPED * (last - i): name for i, name in enumerate(self.parameters)}

    def stored_at(self, name: str) -> "StoredPart | None":
        """What a stored tensor is a part of; None for one that is stored under its own name.

        Args:
            name: Inside the layer, such as ``mlp.experts.7.up_proj.weight``.
        """
        for pattern, tensor, place in self._patterns:
            match = pattern.fullmatch(name)
            if match is not None:
                index = int(match[1]) if pattern.groups else None
                return StoredPart(tensor, place, index)
        return None

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str, int], ...]:
        return tuple(
            (re.compile(re.escape(part).replace(r"\*", r"(0|[1-9]\d{0,5})")), tensor, place)
            for tensor, parts in self.stored.items()
            for place, part in enumerate(parts)
        )


@dataclass(frozen=True)
class StoredPart:
    """Where a stored tensor belongs.

    Attributes:
        tensor: The tensor inside the layer that it is a part of.
        place: Which of the parts that are joined along the rows.
        index: The expert; None where the tensor is only renamed.
    """

    tensor: str
    place: int
    index: int | None
