"""Strategy ``lowbit``: every decoder linear rounded to few bits; shapes stay, memory falls."""

from loram_cli.pruning.strategy import Strategy

STRATEGY = Strategy(
    summary="weights of 2 to 4 bits",
    ratio=None,
    paper_ratios=(),
    importances=("gptq", "yaqa", "nearest"),
    rounds=True,
)
