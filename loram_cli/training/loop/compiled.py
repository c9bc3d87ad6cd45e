"""Compiles the decoder layers of a model that trains: fewer, larger kernels, started together.

A GPU that finishes a kernel sooner than Python starts the next one waits for Python; on fast cards
that decides the time of a step. One layer is compiled and its code serves all of the same shapes
("regional compilation", https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loram_cli.errors import LoramError

# Widths differ from layer to layer in some pruned models, and each shape is a code of its own;
# past torch's own limit of 8 the layers would silently run as they are.
_MOST_SHAPES = 256


@contextmanager
def compiled_layers(model: Any, enabled: bool) -> Iterator[None]:
    """Run a model's decoder layers compiled within the block.

    The layers are compiled when they first run, once more for inputs whose length is not fixed,
    and once more without gradients. Results differ from those of the plain layers by rounding, and
    dropout draws other masks.

    Args:
        model: Any transformers model, with adapters or without; it is itself again afterwards.
        enabled: Do nothing where False.

    Raises:
        LoramError: torch cannot compile them.
    """
    if not enabled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    # Another model's code in this process would count towards the limit.
    torch._dynamo.reset()
    for layer in layers:
        layer.compile()
    limit = torch._dynamo.config.patch(
        recompile_limit=_MOST_SHAPES, accumulated_recompile_limit=_MOST_SHAPES
    )
    try:
        with limit, warnings.catch_warnings():
            # torch's own tracer looks at the gradients of hidden states.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            yield
    except TorchDynamoException as error:
        said = " ".join(" ".join(str(error).split("\n")[:2]).split())
        raise LoramError(
            f"torch cannot compile the model's layers: {said[:200]}",
            "leave out --compile, or install a C++ compiler (g++) where it names none",
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()
