"""What was measured of small models, and the best of it for a memory."""

import pytest

from loram_cli.pruning.frontier import Point, best_fitting, measured
from loram_cli.stages.prune.spec import PruneSpec

POINTS = (
    Point(name="whole", bytes=1.0, kept=1.0),
    Point(name="three", prune={"strategy": "lowbit", "bits": 3}, bytes=0.2, kept=0.9),
    Point(name="three again", prune={"strategy": "lowbit", "bits": 3}, bytes=0.19, kept=0.9),
    Point(name="wide", prune={"strategy": "stru", "ratio": 0.65}, bytes=0.54, kept=0.6),
    Point(name="two", prune={"strategy": "lowbit", "bits": 2}, bytes=0.13, kept=0.5),
)


@pytest.mark.parametrize(
    ("memory_bytes", "name", "missed"),
    [
        (100, "whole", None),
        (99, "three again", "whole"),
        (19, "three again", "whole"),
        (18, "two", "whole"),
        (13, "two", "whole"),
    ],
)
def test_the_best_that_fits_is_chosen_and_not_the_largest(memory_bytes, name, missed):
    chosen = best_fitting(POINTS, lambda point: round(100 * point.bytes), memory_bytes)
    assert chosen is not None
    assert (chosen.point.name, chosen.needed) == (name, round(100 * chosen.point.bytes))
    assert (chosen.missed.name if chosen.missed else None) == missed
    assert chosen.missed_needed == (100 if missed else None)


def test_what_cannot_be_made_or_held_is_not_chosen():
    assert best_fitting(POINTS, lambda point: 14, 13) is None
    assert best_fitting(POINTS, lambda point: None, 13) is None
    only = best_fitting(POINTS, lambda point: 1 if point.name == "wide" else None, 13)
    assert only is not None
    assert (only.point.name, only.missed) == ("wide", None)


def test_every_measured_way_is_one_that_prune_takes():
    base, points = measured()
    assert base
    assert len({point.name for point in points}) == len(points) > 3
    whole = [point for point in points if not point.prune and point.quantize is None]
    assert [point.kept for point in whole] == [1.0]
    for point in points:
        assert 0 < point.bytes <= 1
        spec = PruneSpec(model="x", out="y", calibration="text.txt", **point.prune)
        assert spec.settled().strategy == point.prune.get("strategy", "stru")
