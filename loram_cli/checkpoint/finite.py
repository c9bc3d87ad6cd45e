"""Whether weights are numbers: on a CPU, NaN and infinity can end as plausible results.

A softmax, a maximum, a comparison or a conversion between types can hide them.
"""

from pathlib import Path

import torch

from loram_cli.errors import LoramError


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; whole numbers have none.

    A sum carries both along, and costs bfloat16 a twentieth of what asking every element does.
    Only where it is too large for the type are the lowest and the highest element looked up.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # holds each of their values
    return bool(tensor.sum().isfinite()) or all(bool(e.isfinite()) for e in tensor.aminmax())


def check_finite(file: Path, name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor of a user's file that has NaN or infinity.

    Args:
        file: Where it is from.
        name: Its name there.
        tensor: All of it, or some rows.

    Raises:
        LoramError: It has.
    """
    if not is_finite(tensor):
        raise LoramError(
            f"{file}: tensor {name} has NaN or infinite values",
            "the file is damaged: download it again, or train again what was trained",
        )
