"""What one of several processes holds of a model that they share out (FSDP).

Each holds its slice of every weight. While a decoder layer is at work its weights are whole, and
the next layer's are on their way; what comes after the last layer (final norm, head, and the
embedding where the two are tied) is whole from the forward to the end of the backward pass. See
:mod:`loram_cli.modeling.sharding`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.memory import account
from loram_cli.memory.setup import TrainingSetup

# The one at work, and the one that is gathered ahead.
GATHERED_LAYERS = 2


def gathered_bytes(
    family: Family, config: Mapping[str, Any], tensor_bytes: Callable[[str, int], int]
) -> tuple[int, int]:
    """Bytes of the largest decoder layer, and of what follows the last one."""
    layers: dict[str, int] = {}
    after = 0
    prefix = f"{family.layers}."
    tied = family.geometry(config).tied_embeddings
    for name, shape in family.tensor_shapes(config).items():
        size_bytes = tensor_bytes(name, math.prod(shape))
        if name.startswith(prefix):
            layer = name[len(prefix) :].partition(".")[0]
            layers[layer] = layers.get(layer, 0) + size_bytes
        elif tied or name != f"{family.embedding}.weight":
            after += size_bytes
    return max(layers.values()), after


def shared_weight_bytes(family: Family, config: Mapping[str, Any], setup: TrainingSetup) -> int:
    """Bytes of frozen weights on one of ``setup.processes``, with what is whole at a time."""
    linears = set(family.linear_names(config))
    sliced = constants = 0

    def held(name: str, params: int) -> int:
        quantized = setup.quantize == "nf4" and name in linears
        return -(-params // 2) if quantized else params * setup.compute_bytes

    for name, shape in family.tensor_shapes(config).items():
        params = math.prod(shape)
        sliced += -(-held(name, params) // setup.processes)
        if setup.quantize == "nf4" and name in linears:
            # Block constants are whole everywhere.
            constants += account.nf4_tensor_bytes(params) - held(name, params)
    layer, after = gathered_bytes(family, config, held)
    return sliced + constants + GATHERED_LAYERS * layer + after
