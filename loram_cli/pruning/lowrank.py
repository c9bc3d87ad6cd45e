"""Strategy ``lowrank``: each linear becomes two factors, the best for the activations it sees.

The truncated singular value decomposition of ``W S``, with ``S S'`` the second moments of the
module's inputs on calibration text, loses least of the module's output for a given rank (SVD-LLM,
arXiv 2403.07378). The shapes outside stay whole: the adapter that is trained beside the factors is
the full model's own.
"""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from loram_cli.arch.spec import FACTORS, LOW_RANK, Family
from loram_cli.errors import LoramError
from loram_cli.pruning.plan import pruned_layers
from loram_cli.pruning.strategy import Strategy

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-9


def low_rank_config(
    family: Family, config: Mapping[str, Any], ratio: float, keep_first: int, keep_last: int
) -> dict[str, Any]:
    """The config of a model whose middle layers' linears are factors.

    Args:
        family: Of the model.
        config: The base's ``config.json``.
        ratio: Share of each linear's parameters that goes.
        keep_first: Layers at the input side that stay whole.
        keep_last: Layers at the output side that stay whole.

    Raises:
        UsageError: No layer is left to factor.
    """
    layers = family.geometry(config).layers
    ranks: dict[str, dict[str, int]] = {}
    for i in pruned_layers(len(layers), keep_first, keep_last):
        shapes = family.layer_shapes(i, layers[i], config)
        found = {}
        for module in family.layer_modules(layers[i]):
            # Kernels that read a weight past its module would find none.
            if not module.lora:
                continue
            rows, columns = shapes[f"{family.layer_prefix(i)}{module.name}.weight"]
            rank = max(1, int((1 - ratio) * rows * columns / (rows + columns) + _EPSILON))
            if rank * (rows + columns) < rows * columns:
                found[module.name] = rank
        if found:
            ranks[str(i)] = found
    return {**config, LOW_RANK: ranks}


def factored_name(name: str, known: Container[str]) -> str:
    """The base's tensor that a tensor of the factored model comes from.

    Args:
        name: Of the factored model.
        known: Names of the base's tensors.
    """
    if name in known:
        return name
    owner, _, kind = name.rpartition(".")
    return f"{owner.rpartition('.')[0]}.{kind}"


def factor_names(name: str) -> tuple[str, str]:
    """Names of the two factors of a weight."""
    module, _, kind = name.rpartition(".")
    first, second = (f"{module}.{factor}.{kind}" for factor in FACTORS)
    return first, second


def whitened_factors(
    weight: "torch.Tensor", hessian: "torch.Tensor", rank: int, dampening: float, where: str
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Two factors of a weight that lose least of its output on the calibration text.

    Args:
        weight: Shape (rows, columns).
        hessian: Sum of ``x x^T`` over the text, shape (columns, columns).
        rank: Of the product.
        dampening: Added to the Hessian's diagonal, as a share of its mean.
        where: What to name in an error.

    Returns:
        ``first`` of shape (rank, columns) and ``second`` of shape (rows, rank), in fp32.

    Raises:
        LoramError: The Hessian cannot be factored.
    """
    import torch

    damped = hessian.double().clone()
    damped.diagonal().add_(dampening * damped.diagonal().mean())
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed or not root.isfinite().all():
        raise LoramError(
            f"{where}: the Hessian of its inputs cannot be factored",
            "raise --dampening, or pass more calibration text",
        )
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    # Each factor takes the root of the singular values: both are then alike in scale.
    share = values[:rank].sqrt()
    first = torch.linalg.solve_triangular(
        root, share[:, None] * right[:rank], upper=False, left=False
    )
    return first.float(), (left[:, :rank] * share).float()


STRATEGY = Strategy(
    summary="linears as two factors",
    ratio=0.65,
    paper_ratios=(0.65,),
    importances=("svd",),
    factors_linears=True,
)
