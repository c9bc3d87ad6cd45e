"""Strategy ``unst``: single weights zeroed, anywhere in a decoder linear."""

from loram_cli.pruning.strategy import Strategy

STRATEGY = Strategy(
    summary="single weights",
    ratio=0.65,
    paper_ratios=(0.55,),
    importances=("sparsegpt", "l2"),
)
