"""Linears of few bits while alignment fits them: codes, steps, zeros and scales that can move.

Every number that is stored as a small whole one has a real one beside it that is trained. The
weight is made of the rounded ones, and gradients pass the rounding unchanged (the straight-through
estimator), as in EfficientQAT (arXiv 2407.11062, section 3.2); what is trained is therefore what
will be stored. The real ones are counted in codes, so that one rate suits weights of any size.
On a trellis only steps and scales move: another code would change the values of those after it.
"""

from collections.abc import Iterable
from typing import Any

import torch

from loram_cli.checkpoint.low_bit import LowBit
from loram_cli.checkpoint.low_bit_codes import (
    STEP_RATIO,
    STEPS,
    ZEROS,
    Codes,
    group_steps,
    pack,
    unpack,
    zero_of,
)
from loram_cli.checkpoint.trellis import values_of

# The rate that moves norms and biases moves codes, steps and zeros so many times as fast. On one
# layer of SmolLM2-135M in 2 bits, 64 steps at 1e-3 take the held-out error from 0.0107 to 0.0091
# at this pace, to 0.0094 at a quarter of it, and to 0.033 at three times it.
PACE = 20.0
# A row's scale moves this much as fast as its codes, in powers of two.
_SCALE_SHARE = 0.05


class TrainedLowBitLinear(torch.nn.Module):
    """A linear whose weight is rounded at every use, and whose codes can be trained.

    Args:
        plain: The linear that it takes the place of; its bias is taken over.
        packed: Its rows of bytes, uint8, shape (rows, row_bytes).
        low_bit: How they are rounded.
        device: Where it works.
        pace: How many times as fast as other parameters codes, steps and zeros move.

    Attributes:
        bias: The linear's own.
    """

    def __init__(
        self,
        plain: torch.nn.Linear,
        packed: torch.Tensor,
        low_bit: LowBit,
        device: Any,
        pace: float = PACE,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.low_bit, self.bias, self._pace = low_bit, plain.bias, pace
        start = unpack(packed.to(device), low_bit, plain.in_features)
        grid = low_bit.codes == "grid"
        for name in ("codes", "step", "zero", "scale"):
            stored = getattr(start, name)
            self.register_buffer(f"_{name}", stored, persistent=False)
            if grid or name in ("step", "scale"):
                # How far it has moved; it starts where rounding put it.
                moved = torch.zeros(stored.shape, dtype=torch.float32, device=device)
                self.register_parameter(f"{name}_moved", torch.nn.Parameter(moved))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As a linear."""
        weight = self._weight()
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            weight = weight.to(input.dtype)
        return torch.nn.functional.linear(input, weight, self.bias)

    def own_parameters(self) -> Iterable[torch.nn.Parameter]:
        """What is trained in the place of the weight."""
        return (p for name, p in self.named_parameters() if name.endswith("_moved"))

    @torch.no_grad()
    def packed(self) -> torch.Tensor:
        """Rows of bytes as they are now."""
        codes, step, zero, scale = self._numbers()
        flat = codes.reshape(self.out_features, -1)
        flat, step, zero = (part.to(torch.uint8) for part in (flat, step, zero))
        return pack(Codes(flat, step, zero, scale), self.low_bit)

    def _weight(self) -> torch.Tensor:
        codes, step, zero, scale = self._numbers()
        width = group_steps(step, scale, self.low_bit)
        if self.low_bit.codes == "trellis":
            values = values_of(codes, self.low_bit.bits, torch.float32)
        else:
            values = codes - zero_of(zero, self.low_bit).unsqueeze(-1)
        weight = values * width.unsqueeze(-1)
        return weight.reshape(self.out_features, -1)[:, : self.in_features]

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes by group, step, zero and scale: whole in value, and real to their gradients."""
        codes = self._moved("codes", 2**self.low_bit.bits - 1)
        codes = codes.reshape(self.out_features, -1, self.low_bit.group_size)
        stored: torch.Tensor = self.get_buffer("_scale")
        moved: torch.Tensor = self.get_parameter("scale_moved")
        scale = stored.float() * torch.exp2(_SCALE_SHARE * self._pace * moved)
        scale = scale + (scale.to(torch.float16).float() - scale).detach()
        return (
            codes,
            self._moved("step", STEPS[self.low_bit.codes] - 1),
            self._moved("zero", ZEROS - 1),
            scale,
        )

    def _moved(self, name: str, most: int) -> torch.Tensor:
        stored: torch.Tensor = self.get_buffer(f"_{name}")
        if f"{name}_moved" not in self._parameters:
            return stored
        pace = self._pace
        if name == "step":  # The closer steps lie, the more of them make the same move.
            pace *= STEP_RATIO["grid"] / STEP_RATIO[self.low_bit.codes]
        real = (stored + pace * self.get_parameter(f"{name}_moved")).clamp(0, most)
        return real + (real.round() - real).detach()


def make_trained(
    module: Any,
    names: Iterable[str],
    packed: dict[str, torch.Tensor],
    low_bit: LowBit,
    device: Any,
    pace: float = PACE,
) -> dict[str, TrainedLowBitLinear]:
    """Put trained linears in the place of a module's plain ones.

    Args:
        module: Changed in place.
        names: Of the linears inside the module.
        packed: Rows of bytes by these names.
        low_bit: How they are rounded.
        device: Where the module works.
        pace: As for :class:`TrainedLowBitLinear`.

    Returns:
        The new ones by name.
    """
    made = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        parent = module.get_submodule(owner)
        made[name] = TrainedLowBitLinear(
            getattr(parent, attribute), packed[name], low_bit, device, pace
        )
        setattr(parent, attribute, made[name])
    return made
