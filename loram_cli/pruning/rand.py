"""Strategy ``rand``: groups drawn at random."""

from loram_cli.pruning.groups import LayerKeep
from loram_cli.pruning.strategy import LayerToPrune, Strategy


def keep_random(layer: LayerToPrune) -> LayerKeep:
    """Keep groups drawn uniformly, from a generator of this layer's own."""
    import torch

    generator = torch.Generator().manual_seed(layer.seed * 1_000_003 + layer.index)
    heads = torch.randperm(layer.before.num_key_value_heads, generator=generator)
    channels = torch.randperm(layer.before.intermediate_size, generator=generator)
    return LayerKeep(
        tuple(sorted(heads[: layer.after.num_key_value_heads].tolist())),
        tuple(sorted(channels[: layer.after.intermediate_size].tolist())),
    )


STRATEGY = Strategy(
    summary="random groups",
    ratio=0.65,
    paper_ratios=(0.65, 0.75, 0.85, 0.95),
    keep=keep_random,
)
