"""Refit a linear module to wanted outputs: ridge least squares from its normal equations.

Minimizes over W the squared error ``|X W' - Y|^2 + damp |W - W0|^2``, W0 the weight that pruning
left. The penalty pulls towards W0 and not towards zero: directions in which the calibration text
says nothing stay what they were.
"""

import torch

from loram_cli.errors import LoramError


class NormalEquations:
    """Sums over calibration tokens from which one linear module is refitted.

    Args:
        weight: W0, shape (out_features, in_features).

    Attributes:
        tokens: How many tokens were added.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        out_features, in_features = weight.shape
        self._weight = weight.detach().double()
        self._gram = torch.zeros(in_features, in_features, dtype=torch.double, device=weight.device)
        self._cross = torch.zeros(
            in_features, out_features, dtype=torch.double, device=weight.device
        )
        self.tokens = 0

    def add(self, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: X, shape (..., in_features).
            wanted: Y without the module's bias, shape (..., out_features).
        """
        # Products of two numbers in bfloat16 are exact in fp32, at several times fp64's speed; only
        # the sums over all batches need more.
        exact = torch.float32 if inputs.dtype == torch.bfloat16 else torch.double
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(exact)
        # What W0 misses: the sums then hold small numbers, and W0 itself never has to be solved.
        missing = wanted.detach().reshape(-1, wanted.shape[-1]) - x @ self._weight.to(exact).T
        self._gram += x.T @ x
        self._cross += x.T @ missing.to(exact)
        self.tokens += len(x)

    def solve(self, ridge: float) -> torch.Tensor:
        """The refitted weight, shape (out_features, in_features), in fp64.

        Args:
            ridge: damp, as a share of the inputs' mean square (summed over tokens).

        Raises:
            LoramError: The equations have no unique solution, or are not finite.
        """
        damp = ridge * self._gram.diagonal().mean()
        if not damp.isfinite() or not self._cross.isfinite().all():
            raise LoramError("calibration activations are not finite")
        if not self._gram.any():
            return self._weight.clone()
        damped = self._gram.clone()
        damped.diagonal().add_(damp)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise LoramError(
                f"{self.tokens} calibration tokens do not determine a weight of "
                f"{len(damped)} inputs",
                "raise --ridge, or --calibration-samples",
            )
        return self._weight + torch.cholesky_solve(self._cross, factor).T
