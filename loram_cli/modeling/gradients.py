"""Gradients of the language-model loss for Taylor importance."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter


@contextmanager
def loss_gradients(
    model: Any, parameter_names: Iterable[str], windows: torch.Tensor, reporter: Reporter
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Accumulate gradients of the mean next-token loss over calibration windows.

    Only the named parameters get a gradient, so that memory is the model plus what is ranked.

    Args:
        model: A causal LM.
        parameter_names: Whose gradients are wanted.
        windows: Token ids, shape (samples, length).
        reporter: Told of progress.

    Yields:
        Weight and gradient by parameter name, both of the parameter's shape.

    Raises:
        LoramError: The loss is not finite.
    """
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    wanted = {name: parameters[name].requires_grad_(True) for name in parameter_names}
    with reporter.progress("calibrate", len(windows), "window") as progress:
        for window in windows:
            ids = window[None].to(model.device)  # (1, length)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(windows)
            if not loss.isfinite():
                raise LoramError("the base model's loss on the calibration text is not finite")
            loss.backward()
            progress.advance()
    yield {name: (p.detach(), p.grad) for name, p in wanted.items()}
    model.zero_grad(set_to_none=True)
