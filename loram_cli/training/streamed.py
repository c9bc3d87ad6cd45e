"""Where a training layer by layer has its parts: device, memory of the machine, disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loram_cli.memory.streaming import StreamedMemory
from loram_cli.memory.training import USABLE_SHARE
from loram_cli.modeling.free_memory import free_memory_bytes
from loram_cli.modeling.layerwise.kept_states import Place
from loram_cli.modeling.layerwise.lora_pass import LoraPass, streamed_lora
from loram_cli.modeling.skeleton import SkeletonModel
from loram_cli.reporting import Reporter
from loram_cli.units import format_bytes

# Of the machine's free memory, for copies of layers beside a GPU.
_HOST_SHARE = 0.8


@contextmanager
def streamed_within(
    skeleton: SkeletonModel,
    model: Any,
    memory: StreamedMemory,
    reporter: Reporter,
    *,
    offload_activations: bool,
    directory: Path,
) -> Iterator[LoraPass]:
    """Open the pass of a model whose layers come and go, as the free memory allows.

    What a GPU has left beside the training keeps layers that then need not come again; most of
    the machine's memory holds copies of the others. A CPU reads all of them as they are needed.

    Args:
        skeleton: Not filled yet.
        model: The PEFT model around it.
        memory: What the training takes without a layer that stays.
        reporter: Progress and warnings.
        offload_activations: Keep hidden states off the GPU; on a CPU, in a file.
        directory: Where that file goes.

    Raises:
        LoramError: A tensor is absent or of another shape.
    """
    layers = [sum(slot.num_bytes for slot in slots) for _, slots in skeleton.layers()]
    stay = host_bytes = 0
    place: Place = "device"
    if skeleton.device.startswith("cuda"):
        spare_bytes = int(free_memory_bytes(skeleton.device) * USABLE_SHARE) - memory.allocated
        stay = max(0, min(len(layers), spare_bytes // max(layers)))
        # Hidden states that are kept there take their share first.
        host_bytes = max(0, int(_HOST_SHARE * free_memory_bytes("cpu")) - memory.host)
        place = "host" if offload_activations else "device"
    elif offload_activations:
        place = directory
    reporter.note(
        f"layer by layer: {len(layers) - stay} of {len(layers)} layers "
        f"({format_bytes(sum(layers[stay:]))}) come and go, twice a step"
    )
    with streamed_lora(
        skeleton, model, reporter, stay=stay, host_bytes=host_bytes, activations=place
    ) as passes:
        yield passes
