"""Several data sources as one: ``a.jsonl:0.5,b.jsonl:0.25``, parsed and mixed."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from loram_cli.errors import UsageError
from loram_cli.training.choices import Exhausted
from loram_cli.training.data.files import kind_at
from loram_cli.training.data.records import DEMO_PREFIX, local_files
from loram_cli.training.data.spool import Chain, Subset

T = TypeVar("T")

_WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>[0-9]+(\.[0-9]*)?|\.[0-9]+)", re.DOTALL)
# A source that has to be repeated more often has too small a share of the data, or too large a
# weight: nobody means that.
_MOST_REPEATS = 1000
# Only the proportions matter; beyond these they would be lost in rounding.
_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        name: A file, a folder, ``demo:NAME`` or a hub id, as :func:`.records.read_records` takes.
        weight: Its share, relative to the other weights; None where none was given.
    """

    name: str
    weight: float | None = None


def parse_sources(data: str) -> tuple[Source, ...]:
    r"""The sources of a data setting, parted by commas, each with a weight or none with one.

    A weight is a decimal number after the last colon: ``demo:train``, ``C:\data\a.jsonl`` and
    ``owner/name:config`` have none, ``demo:train:0.5`` has one. A file or folder of exactly that
    name comes first, so that a comma or a colon in a name is no obstacle; a hub configuration
    that is a number needs a weight behind it (``owner/name:2023:1``).

    Raises:
        UsageError: A name is empty, a weight is 0 or no decimal number, or some sources have a
            weight and others have none.
    """
    if data and kind_at(Path(data)) is not None:
        return (Source(data),)
    sources = tuple(_source(part.strip()) for part in data.split(","))
    unweighted = [source.name for source in sources if source.weight is None]
    if 0 < len(unweighted) < len(sources):
        raise UsageError(
            f"{data}: '{unweighted[0]}' has no weight and others have one",
            "give every source a weight (a.jsonl:0.5,b.jsonl:0.25), or none",
        )
    return sources


def data_files(data: str) -> list[Path] | None:
    """All local files behind a data setting, in order; None where one source is a hub data set.

    Raises:
        LoramError: A source can only be a local path, and is not there or holds no data file.
        UsageError: As :func:`parse_sources`.
    """
    files: list[Path] = []
    for source in parse_sources(data):
        if source.name.startswith(DEMO_PREFIX):
            continue
        found = local_files(source.name)
        if found is None:
            return None
        files.extend(found)
    return files


def load_sources(
    data: str,
    load: Callable[[str], Sequence[T]],
    *,
    limit: int | None = None,
    seed: int = 0,
    exhausted: Exhausted = "stop",
) -> Sequence[T]:
    """Load every source and mix them by weight; without weights, one after the other.

    ``load`` reads one source; ``seed`` and ``exhausted`` are as for :func:`mix`.

    Raises:
        LoramError: From ``load``.
        UsageError: As :func:`parse_sources` and :func:`mix`.
    """
    sources = parse_sources(data)
    parts = [load(source.name) for source in sources]
    weights = [source.weight for source in sources if source.weight is not None]
    whole: Sequence[T] = parts[0] if len(parts) == 1 else Chain(parts)
    try:
        if len(parts) > 1 and weights:
            places = mixed_places([len(part) for part in parts], weights, seed, exhausted)
            whole = Subset(whole, places)
    except UsageError as error:
        raise UsageError(f"{data}: {error.message}", error.hint) from error
    # In memory as long as its parts are.
    return (list(whole) if all(isinstance(p, list) for p in parts) else whole)[:limit]


def mix(
    parts: Sequence[Sequence[T]],
    weights: Sequence[float],
    *,
    seed: int = 0,
    exhausted: Exhausted = "stop",
) -> list[T]:
    """Items of several sources in the proportions of their weights; see :func:`mixed_places`."""
    places = mixed_places([len(part) for part in parts], weights, seed, exhausted)
    return list(Subset(Chain(parts), places))


def mixed_places(
    lengths: Sequence[int], weights: Sequence[float], seed: int, exhausted: Exhausted
) -> list[int]:
    """Which items of sources one after the other a mixture takes, in a random order.

    Counts are exact to rounding. A source keeps its own order; where only a part of it is taken,
    the part is drawn.

    Args:
        lengths: Items of each source, at least one.
        weights: As many, above 0; only their proportions matter.
        seed: Decides what is drawn, and the order. The same seed gives the same list.
        exhausted: ``stop`` ends with the source that is used up first: nothing is repeated, and
            the others are not used whole. ``repeat`` uses every source whole, and repeats those
            that are used up before.

    Raises:
        UsageError: A weight leaves a source without a single item, or has one repeated more than
            a thousand times.
    """
    if not all(lengths):
        raise UsageError("a source of the mixture holds nothing", "leave it out")
    total = sum(weights)
    shares = [weight / total for weight in weights]
    ends = [count / share for count, share in zip(lengths, shares, strict=True)]
    length = min(ends) if exhausted == "stop" else max(ends)
    counts = [round(length * share) for share in shares]
    for number, (own, count) in enumerate(zip(lengths, counts, strict=True), 1):
        if not count:
            raise UsageError(
                f"source {number} gets no example of {round(length)} at its weight",
                "raise its weight, or leave it out",
            )
        if count > _MOST_REPEATS * own:
            raise UsageError(
                f"source {number} would be repeated {count // own} times",
                "lower its weight, or stop when the first source is used up",
            )
    rng = random.Random(f"mix-{seed}")
    queues = []
    for start, own, count in zip(accumulate(lengths, initial=0), lengths, counts, strict=False):
        whole, rest = divmod(count, own)
        drawn = sorted(rng.sample(range(own), rest))
        queues.append(iter([start + place for place in [*list(range(own)) * whole, *drawn]]))
    order = [i for i, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(order)
    return [next(queues[i]) for i in order]


def _source(part: str) -> Source:
    if part and kind_at(Path(part)) is not None:
        return Source(part)
    match = _WEIGHTED.fullmatch(part)
    if match is None:
        head, colon, tail = part.rpartition(":")
        if not part or (colon and kind_at(Path(head)) is not None):
            raise UsageError(
                f"data source '{part}': expected a name, or NAME:WEIGHT with a decimal number",
                f"'{tail}' is not one" if part else "is there a comma too many?",
            )
        return Source(part)
    weight = float(match["weight"])
    if not 1 / _LARGEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise UsageError(
            f"data source '{part[:100]}': the weight must be from {1 / _LARGEST_WEIGHT:g} to "
            f"{_LARGEST_WEIGHT:g}"
        )
    return Source(match["name"], weight)
