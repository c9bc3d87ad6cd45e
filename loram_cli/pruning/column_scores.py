"""Importance of input features of a linear module, from its weight and its inputs' Hessian.

``wanda`` scores a weight by its magnitude times the norm of its input (Wanda, arXiv 2306.11695;
summed over a structure as FLAP's baseline Wanda-sp, arXiv 2312.11983). ``obs`` asks what is lost in
the module's output once all other weights have made up for a group of columns by least squares
(optimal brain surgeon; ZipLM, arXiv 2302.04089), and so goes with ``align --method reconstruct``,
which fits in that very way.
"""

import torch

from loram_cli.errors import LoramError

# Groups go in at most so many rounds: one at a time would invert a wide MLP's Hessian thousands
# of times.
_ROUNDS = 96


def wanda_scores(weight: torch.Tensor, hessian: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums of ``|w| * |x|`` over the columns of each group.

    Args:
        weight: Shape (rows, columns).
        hessian: Sum of ``x x^T`` over the calibration text, shape (columns, columns).
        groups: Columns are split into so many equal runs.

    Returns:
        Shape (groups,), in fp64.
    """
    norms = hessian.diagonal().double().sqrt()
    columns = weight.detach().double().abs().sum(dim=0) * norms
    return columns.reshape(groups, -1).sum(dim=1)


def obs_scores(
    weight: torch.Tensor, hessian: torch.Tensor, groups: int, dampening: float
) -> torch.Tensor:
    """What the module's output loses by each group of columns, as they go one after the other.

    The groups that cost least go first, a few in a round; after each round the other weights make
    up for them. A group's score is what all groups up to it cost together, so that those that go
    last score highest.

    Args:
        weight: Shape (rows, columns).
        hessian: Sum of ``x x^T`` over the calibration text, shape (columns, columns).
        groups: Columns are split into so many equal runs.
        dampening: Added to the diagonal, as a share of its mean.

    Returns:
        Shape (groups,), in fp64.

    Raises:
        LoramError: The Hessian cannot be inverted.
    """
    width = weight.shape[1] // groups
    w = weight.detach().double().clone()
    damped = hessian.double().clone()
    damped.diagonal().add_(dampening * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise LoramError(
            "the Hessian of the calibration activations cannot be inverted",
            "raise --dampening, or pass more calibration text",
        )
    # Each of these is gigabytes in a wide MLP.
    del damped
    inverse = torch.cholesky_inverse(lower)
    del lower
    left = torch.arange(groups, device=w.device)
    scores = torch.zeros(groups, dtype=torch.double, device=w.device)
    at_once = -(-groups // _ROUNDS)
    spent = 0.0
    while len(left):
        costs = _costs(w, inverse, left, width)
        order = torch.sort(costs, stable=True).indices[: min(at_once, len(left))]
        going = left[order]
        scores[going] = spent + costs[order].cumsum(0)
        spent = float(scores[going[-1]])
        columns = (going[:, None] * width + torch.arange(width, device=w.device)).flatten()
        # The others take over by least squares, and what is gone leaves the inverse.
        block = inverse[columns]
        share = torch.linalg.solve(block[:, columns], block)
        w -= w[:, columns] @ share
        inverse -= block.T @ share
        left = left[~torch.isin(left, going)]
    return scores


def _costs(
    weight: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor, width: int
) -> torch.Tensor:
    """Squared error of the output by the loss of each single group, shape (groups,)."""
    columns = groups[:, None] * width + torch.arange(width, device=weight.device)
    if width == 1:
        one = columns[:, 0]
        return weight[:, one].square().sum(dim=0) / inverse.diagonal()[one]
    blocks = inverse[columns[:, :, None], columns[:, None, :]]
    parts = weight[:, columns.flatten()].reshape(len(weight), len(groups), width).permute(1, 2, 0)
    return (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2))
