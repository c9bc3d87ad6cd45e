"""A linear module held as two factors, ``second @ first``, and the way of PEFT's LoRA to it."""

from typing import Any

import torch

from loram_cli.arch.spec import LOW_RANK, Family


class LowRankLinear(torch.nn.Module):
    """``y = second(first(x))``: a linear of shape (rows, columns) at some rank.

    Args:
        columns: Input features.
        rows: Output features.
        rank: Of the product.
        bias: Whether the second factor has one.
        dtype: Of the factors.
    """

    def __init__(
        self, columns: int, rows: int, rank: int, *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.first = torch.nn.Linear(columns, rank, bias=False, dtype=dtype)
        self.second = torch.nn.Linear(rank, rows, bias=bias, dtype=dtype)

    @property
    def weight(self) -> torch.Tensor:
        """A weight of it, by which PEFT tells device and type."""
        return self.second.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs, shape (..., rows), of inputs of shape (..., columns)."""
        out: torch.Tensor = self.second(self.first(hidden))
        return out


def set_low_rank(model: Any, family: Family, config: dict[str, Any]) -> None:
    """Put factors in the place of the linears that the config has ranks for.

    Args:
        model: A causal LM without weights; changed in place.
        family: Its family.
        config: The parsed ``config.json``.
    """
    for index, ranks in (config.get(LOW_RANK) or {}).items():
        layer = model.get_submodule(family.layers)[int(index)]
        for name, rank in ranks.items():
            linear = layer.get_submodule(name)
            factors = LowRankLinear(
                linear.in_features,
                linear.out_features,
                rank,
                bias=linear.bias is not None,
                dtype=linear.weight.dtype,
            )
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, factors)


def register_low_rank(config: Any) -> Any:
    """Tell PEFT's LoRA config how to put factors beside a :class:`LowRankLinear`."""
    from peft.tuners.lora import Linear

    config._register_custom_module({LowRankLinear: Linear})
    return config
