"""Slices of tensors, read and planned through keep indices."""

from collections.abc import Iterator, Mapping

import torch

from loram_cli.arch.spec import Family, Geometry
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.pruning.groups import LayerKeep

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def split_parameter_name(name: str) -> tuple[str, str]:
    """``...q_proj.weight`` as module name and ``weight`` or ``bias``."""
    module, _, kind = name.rpartition(".")
    return module, kind


def read_kept(
    reader: TensorReader,
    name: str,
    family: Family,
    geometry: Geometry,
    keep: Mapping[int, LayerKeep],
) -> Iterator[torch.Tensor]:
    """Read what stays of a tensor, some MiB at a time.

    Args:
        reader: Open on the base checkpoint.
        name: Tensor name in the base.
        family: Tells the tensor's axes.
        geometry: The base's widths.
        keep: Kept indices of every pruned layer.

    Yields:
        The kept rows, cut to the kept columns, in their original order.
    """
    module_name, kind = split_parameter_name(name)
    found = family.module_named(module_name)
    rows = columns = None
    if found is not None and found[0] in keep:
        layer, module = found
        rows = keep[layer].rows(module, geometry.layers[layer])
        columns = keep[layer].columns(module, geometry.layers[layer])
    other = family.tensor_named(name)
    if other is not None and other[0] in keep:
        layer, tensor = other
        rows = keep[layer].tensor_rows(tensor, geometry.layers[layer])
        columns = keep[layer].tensor_columns(tensor, geometry.layers[layer])
    elif kind != "weight":
        columns = None
    wanted = None if columns is None else torch.tensor(columns)
    for _, chunk in reader.read_chunks(name, rows):
        yield chunk if wanted is None else _gather_columns(chunk, wanted)


def _gather_columns(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    # gather on integers of the same width is four times as fast as index_select on bfloat16.
    bits = rows.view(_BITS[rows.dtype.itemsize])
    return bits.gather(1, columns.expand(rows.shape[0], -1)).view(rows.dtype)
