"""Gradient steps on one decoder layer towards wanted outputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loram_cli.errors import LoramError
from loram_cli.modeling.layerwise.stream import DecoderLayer

Draw = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BlockSteps:
    """How to step.

    Attributes:
        count: AdamW steps per layer.
        learning_rate: Of the first step; it falls linearly to zero.
        each_token: Measure each token's error against its own size. A model's first token can be
            a thousand times as large as all others, and would be all that is fitted.
    """

    count: int
    learning_rate: float
    each_token: bool = False


def take_block_steps(
    layer: DecoderLayer, draw: Draw, batches: int, steps: BlockSteps, *, seed: int
) -> None:
    """Fit all parameters of a layer to wanted outputs by mean squared error.

    Args:
        layer: Changed in place; parameters end in the type that they had.
        draw: Inputs and wanted outputs of the batch with the given index.
        batches: How many batches there are; each step takes one.
        steps: How many, how fast.
        seed: Decides their order.

    Raises:
        LoramError: The error is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(layer.module.parameters())
    before = [parameter.data for parameter in parameters]
    device = before[0].device.type
    for parameter in parameters:
        # Masters in fp32: small steps vanish in bfloat16's eight bits.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=steps.learning_rate, weight_decay=0.0)
    try:
        for step in range(steps.count):
            for group in optimizer.param_groups:
                group["lr"] = steps.learning_rate * (1 - step / steps.count)
            if step % batches == 0:
                order = torch.randperm(batches, generator=generator).tolist()
            hidden, wanted = draw(order[step % batches])
            wanted = wanted.float()
            with torch.autocast(device, torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
                out = layer(hidden)
            over = -1 if steps.each_token else (0, 1, 2)
            missed = (out.float() - wanted).square().mean(over)
            loss = (missed / wanted.square().mean(over)).mean()
            if not loss.isfinite():
                raise LoramError(
                    f"the error of {layer.prefix.rstrip('.')} is not finite at step {step + 1}",
                    "lower --block-learning-rate",
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for parameter, old in zip(parameters, before, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = None
            old.copy_(parameter.data)
            parameter.data = old
