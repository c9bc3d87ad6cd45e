"""Rows of the memory report for the full model layer by layer: memory, traffic and time a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loram_cli.arch.spec import Family
from loram_cli.memory.picture import Bar
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.streaming import (
    StepTraffic,
    StreamedMemory,
    step_traffic,
    streamed_training_memory,
)

_PRECISIONS: tuple[Literal["bf16", "nf4"], ...] = ("bf16", "nf4")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a machine does in a second.

    Attributes:
        bus: Bytes between its memory and the GPU.
        disk: Bytes from the disk.
        flops: Floating-point operations of the GPU, as a training reaches them.
        start_seconds: That its processor takes to start a layer's kernels, forward and back.
    """

    bus: float
    disk: float
    flops: float
    start_seconds: float

    def seconds(self, traffic: StepTraffic) -> float:
        """The least time of a step."""
        return traffic.seconds(
            device_bandwidth=self.bus,
            disk_bandwidth=self.disk,
            flops_per_second=self.flops,
            start_seconds=self.start_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class StreamRow:
    """LoRA on the full model, layer by layer, at one precision and batch.

    Attributes:
        precision: Of the frozen weights.
        batch: Examples of an optimizer step.
        weight_bytes: Embedding, head, norms and two decoder layers.
        training_state_bytes: Factors, gradients and moments.
        activation_bytes: Hidden states between layers, and one layer's activations.
        logits_bytes: The head's and the cross-entropy's share.
        context_bytes: The CUDA context.
        training_bytes: All of it: the predicted peak on the device.
        offloaded_training_bytes: The same with ``--offload-activations``.
        smallest_card_gib: The smallest of the common cards that holds ``training_bytes``.
        offloaded_card_gib: And that holds ``offloaded_training_bytes``.
        host_bytes: Copies of the layers in the machine's memory.
        offloaded_host_bytes: The same, and the hidden states.
        bus_bytes: From there to the device in a step; the hidden states not counted.
        disk_bytes: From the disk in a step, where the machine's memory holds no copies.
        bus_seconds: A step's least time from the machine's memory.
        disk_seconds: And from the disk.
        tokens_per_second: From the machine's memory.
    """

    precision: Literal["bf16", "nf4"]
    batch: int
    weight_bytes: int
    training_state_bytes: int
    activation_bytes: int
    logits_bytes: int
    context_bytes: int
    training_bytes: int
    offloaded_training_bytes: int
    smallest_card_gib: int | None
    offloaded_card_gib: int | None
    host_bytes: int
    offloaded_host_bytes: int
    bus_bytes: int
    disk_bytes: int
    bus_seconds: float
    disk_seconds: float
    tokens_per_second: float

    @property
    def name(self) -> str:
        """Such as ``stream QLoRA, batch 32``."""
        return f"stream {'Q' if self.precision == 'nf4' else ''}LoRA, batch {self.batch}"

    def bar(self) -> Bar:
        """The training memory as a bar, part by part."""
        return Bar(
            self.name,
            (
                ("weights", self.weight_bytes),
                ("state", self.training_state_bytes),
                ("activations", self.activation_bytes),
                ("loss", self.logits_bytes),
                ("CUDA", self.context_bytes),
            ),
        )


def stream_rows(
    family: Family,
    config: dict[str, Any],
    setup: TrainingSetup,
    batches: Sequence[int],
    speeds: Speeds,
    head_params: int = 0,
) -> Iterator[StreamRow]:
    """A row for each precision and batch.

    Args:
        family: Of the base.
        config: Its ``config.json``.
        setup: How it is trained.
        batches: Examples of an optimizer step; the last micro-batch of one may be smaller, which
            is counted as a whole one.
        speeds: Of the machine.
        head_params: Of a head that is stored beside a tied embedding.
    """
    for precision in _PRECISIONS:
        mine = replace(setup, quantize="nf4" if precision == "nf4" else None)
        for batch in batches:
            yield _row(family, config, mine, batch, speeds, head_params * mine.compute_bytes)


def micro_batches(setup: TrainingSetup, batch: int) -> tuple[TrainingSetup, int]:
    """The setup with a micro-batch of at most the batch, and how many of these a step has."""
    setup = replace(setup, micro_batch=min(setup.micro_batch, batch))
    return setup, -(-batch // setup.micro_batch)


def _row(
    family: Family,
    config: dict[str, Any],
    setup: TrainingSetup,
    batch: int,
    speeds: Speeds,
    head_bytes: int,
) -> StreamRow:
    setup, count = micro_batches(setup, batch)

    def memory(*, offload: bool) -> StreamedMemory:
        found = streamed_training_memory(
            family, config, setup, count, offload_activations=offload, host_copies=True
        )
        return replace(found, weights=found.weights + head_bytes)

    plain, offloaded = memory(offload=False), memory(offload=True)
    copied = step_traffic(family, config, setup, count, host_copies=True)
    read = step_traffic(family, config, setup, count)
    bus_seconds = speeds.seconds(copied)
    return StreamRow(
        precision="nf4" if setup.quantize else "bf16",
        batch=batch,
        weight_bytes=plain.weights,
        training_state_bytes=plain.state,
        activation_bytes=plain.activations,
        logits_bytes=plain.logits,
        context_bytes=plain.context,
        training_bytes=plain.total,
        offloaded_training_bytes=offloaded.total,
        smallest_card_gib=plain.smallest_card_gib,
        offloaded_card_gib=offloaded.smallest_card_gib,
        host_bytes=plain.host,
        offloaded_host_bytes=offloaded.host,
        bus_bytes=copied.device_bytes,
        disk_bytes=read.disk_bytes,
        bus_seconds=bus_seconds,
        disk_seconds=speeds.seconds(read),
        tokens_per_second=count * setup.tokens / bus_seconds,
    )
