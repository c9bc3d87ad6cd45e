"""Slices of tensors, read and planned through keep indices."""

from collections.abc import Mapping

import torch

from loram_cli.arch.spec import Family, Geometry
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.pruning.groups import LayerKeep


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
) -> torch.Tensor:
    """Read what stays of a tensor; dropped rows are not read from disk.

    Args:
        reader: Open on the base checkpoint.
        name: Tensor name in the base.
        family: Tells the tensor's axes.
        geometry: The base's widths.
        keep: Kept indices of every pruned layer.

    Returns:
        The kept rows and columns, in their original order.
    """
    module_name, kind = split_parameter_name(name)
    found = family.module_named(module_name)
    if found is None or found[0] not in keep:
        return reader.read(name)
    layer, module = found
    rows = keep[layer].rows(module, geometry.layers[layer])
    tensor = reader.read(name) if rows is None else reader.read_rows(name, rows)
    columns = keep[layer].columns(module, geometry.layers[layer])
    if kind == "weight" and columns is not None:
        tensor = tensor.index_select(1, torch.tensor(columns))
    return tensor
