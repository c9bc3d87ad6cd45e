"""What a fit of all parameters does differently for a model of few bits."""

from pathlib import Path
from typing import Any

from loram_cli.checkpoint.low_bit import PackedEntry
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.checkpoint.writer import ShardedWriter, TensorPlan
from loram_cli.modeling.low_bit_training import TrainedLowBitLinear, make_trained

# A quarter of what they move a step where layers are fitted, at this stage's own lower rate: the
# whole model follows, and not one layer.
_PACE = 100.0


def with_trained_codes(model: Any, source: Model, device: str) -> dict[str, TrainedLowBitLinear]:
    """Let a loaded model's linears of few bits be trained as what will be stored.

    Args:
        model: The source's model with floating weights; changed in place.
        source: The model of few bits.
        device: Where the model is.

    Returns:
        The trained linears by their weights' names.
    """
    assert source.low_bit is not None
    made = {}
    with TensorReader(source.index, once=True) as reader:
        for weight in source.linear_names:
            name = weight.removesuffix(".weight")
            rows = {name: reader.read_packed(weight)}
            trained = make_trained(model, [name], rows, source.low_bit, device, pace=_PACE)
            made[weight] = trained[name]
    return made


def write_low_bit(
    model: Any, trained: dict[str, TrainedLowBitLinear], source: Model, out: Path
) -> None:
    """Write a fitted model in the source's order, shapes and types."""
    parameters = dict(model.named_parameters())
    entries = source.index.tensors
    plan = {
        name: TensorPlan.like(entry.stored if isinstance(entry, PackedEntry) else entry)
        for name, entry in entries.items()
    }
    with TensorReader(source.index, once=True) as reader, ShardedWriter(out, plan) as writer:
        for name, tensor in plan.items():
            if name in trained:
                writer.write(name, trained[name].packed().cpu())
            elif isinstance(entries[name], PackedEntry):  # of codes that were not trained
                writer.write(name, reader.read_packed(name))
            elif name in parameters:
                writer.write(name, parameters[name].detach().to("cpu", tensor.dtype))
            else:  # a stored twin of a tied head
                writer.write(name, reader.read(name))
