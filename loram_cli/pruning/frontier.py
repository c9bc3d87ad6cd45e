"""What small models kept of full LoRA's gain where it was measured, and the best that fits.

The figures are those of ``make bench-gain``, which writes ``frontier.json`` beside this file.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

from loram_cli.schema import spec_from_mapping

_FILE = "frontier.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured way to train.

    Attributes:
        name: Of the bench's row.
        prune: Settings of ``prune`` that make the small model; empty where the base is trained on.
        align: The method of ``align`` that followed; None without.
        quantize: What the frozen weights were held in while training; None in their own type.
        fit_scale: Whether the recovered update was scaled (``recover --fit-scale``).
        bytes: The frozen decoder layers as training held them, against bf16.
        kept: Share of full LoRA's gain.
        seeds: That it is the mean of.
    """

    name: str
    prune: dict[str, Any] = field(default_factory=dict)
    align: str | None = None
    quantize: Literal["nf4"] | None = None
    fit_scale: bool = False
    bytes: float
    kept: float
    seeds: int = 1


@dataclass(frozen=True)
class Choice:
    """The best way for a memory.

    Attributes:
        point: The way.
        needed: What it needs, in bytes.
        missed: The best way of those that kept more and need too much; None where none did.
        missed_needed: What that one needs.
    """

    point: Point
    needed: int
    missed: Point | None = None
    missed_needed: int | None = None


@cache
def measured() -> tuple[str, tuple[Point, ...]]:
    """The base that was measured on, and its points."""
    file = resources.files("loram_cli.pruning") / _FILE
    data: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
    points = (spec_from_mapping(Point, point, _FILE) for point in data["points"])
    return str(data["base"]), tuple(points)


def best_fitting(
    points: Iterable[Point], needed: Callable[[Point], int | None], memory_bytes: int
) -> Choice | None:
    """The point that kept most of those that fit; of equal ones that of fewer bytes.

    Args:
        points: To choose from.
        needed: Memory that a point's training needs; None where the model cannot be made so.
        memory_bytes: That there is.

    Returns:
        None where nothing fits.
    """
    ranked = sorted(points, key=lambda point: (-point.kept, point.bytes))
    missed: tuple[Point, int] | None = None
    for point in ranked:
        asked = needed(point)
        if asked is None:
            continue
        if asked <= memory_bytes:
            return Choice(point, asked, *(missed or ()))
        missed = missed or (point, asked)
    return None
