"""Strategy ``semi``: two of every four weights zeroed, as sparse tensor cores want."""

from loram_cli.pruning.strategy import Strategy

STRATEGY = Strategy(
    summary="2:4",
    ratio=0.5,
    paper_ratios=(0.5,),
    importances=("sparsegpt", "l2"),
    zeros_in_four=2,
)
