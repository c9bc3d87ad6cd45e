"""The table of pruning strategies: each one is a file and a line here."""

from loram_cli.pruning import depth, lowbit, lowrank, rand, semi, stru, unst
from loram_cli.pruning.strategy import Strategy

# Unless told.
DEFAULT = "stru"
STRATEGIES: dict[str, Strategy] = {
    "rand": rand.STRATEGY,
    "stru": stru.STRATEGY,
    "semi": semi.STRATEGY,
    "unst": unst.STRATEGY,
    "lowbit": lowbit.STRATEGY,
    "depth": depth.STRATEGY,
    "lowrank": lowrank.STRATEGY,
}


def strategy_named(name: str) -> Strategy:
    """The strategy of a name that a spec has checked."""
    return STRATEGIES[name]


def summaries() -> str:
    """Every strategy in a few words, for help texts."""
    return "; ".join(f"{name}: {strategy.summary}" for name, strategy in STRATEGIES.items())
