"""95% confidence intervals of the figures that tasks report."""

import math

Z95 = 1.959964


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """For a share of right answers; unlike the normal one it is no point at 0 or 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22 (1927).
    """
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half = Z95 / (1 + z2 / trials) * spread
    return max(0.0, centre - half), min(1.0, centre + half)


def normal_interval(
    value: float, stderr: float | None, *, lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float] | None:
    """For a mean with a known standard error."""
    if stderr is None:
        return None
    half = Z95 * stderr
    return max(lowest, value - half), min(highest, value + half)
