"""All ways to train a model that fit a memory, with what each costs: the answer to ``--fit``."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from loram_cli.arch.spec import Family
from loram_cli.errors import UsageError
from loram_cli.memory import account
from loram_cli.memory.setup import TrainingSetup
from loram_cli.memory.streaming import layer_bytes, step_traffic, streamed_training_memory
from loram_cli.memory.training import USABLE_SHARE, TrainingMemory, training_memory
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.tools.stream_rows import Speeds, micro_batches

Kind = Literal["resident", "pruned", "streamed"]
_PRECISIONS: tuple[Literal["bf16", "nf4"], ...] = ("bf16", "nf4")
# Without checkpointing a frozen weight has two products of the three: no second forward pass. Its
# kernels take half as long to start.
_WITHOUT_RECOMPUTING = 2 / 3
_STARTS_WITHOUT_RECOMPUTING = 1 / 2
# The largest ratio of the paper's tables: what little is left beyond it is no model to train on.
_MOST_HUNDREDTHS = 95


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train that fits.

    Attributes:
        kind: ``resident`` (the full model on the device), ``pruned`` (LoRAM), or ``streamed`` (the
            full model, layer by layer).
        precision: Of the frozen weights.
        ratio: Of the pruning, the smallest in steps of a hundredth, at most that of the paper's
            tables; 0 for the full model.
        multiple_of: Kept MLP channels are a multiple of it.
        micro_batch: Examples per forward pass.
        gradient_checkpointing: Whether it is needed; streaming always recomputes.
        offload_activations: Whether it is needed.
        training_bytes: The predicted peak on the device.
        host_bytes: Of the machine's memory, for layers and hidden states.
        params: Of the model that is trained on.
        seconds: A step's least time, with the layers in the machine's memory.
        disk_seconds: The same with the layers read from the disk; None where none are read.
    """

    kind: Kind
    precision: Literal["bf16", "nf4"]
    ratio: float = 0.0
    multiple_of: int = 1
    micro_batch: int
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    training_bytes: int
    host_bytes: int = 0
    params: int
    seconds: float
    disk_seconds: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the full model itself is trained on."""
        return self.kind != "pruned"

    @property
    def name(self) -> str:
        """Such as ``QLoRAM 0.64`` or ``stream QLoRA``."""
        name = ("Q" if self.precision == "nf4" else "") + "LoRA"
        if self.kind == "pruned":
            return f"{name}M {self.ratio:.2f}"
        return f"stream {name}" if self.kind == "streamed" else name

    @property
    def flags(self) -> str:
        """The flags of ``train`` that it needs beside the defaults, each after a space."""
        flags = ["--quantize nf4"] if self.precision == "nf4" else []
        if self.kind != "streamed" and self.gradient_checkpointing:
            flags.append("--gradient-checkpointing")
        if self.micro_batch != TrainingSetup().micro_batch:
            flags.append(f"--micro-batch {self.micro_batch}")
        flags += ["--offload-activations"] if self.offload_activations else []
        return "".join(f" {flag}" for flag in flags)

    @property
    def commands(self) -> tuple[str, ...]:
        """What to type."""
        if self.kind == "pruned":
            multiple = f" --multiple-of {self.multiple_of}" if self.multiple_of > 1 else ""
            prune = f"loram prune --ratio {self.ratio:.2f}{multiple}"
            return prune, f"loram train{self.flags}", "loram recover"
        stream = " --stream" if self.kind == "streamed" else ""
        return (f"loram train --on full{stream}{self.flags}",)

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        return {
            "name": self.name, "exact": self.exact, "commands": list(self.commands), **asdict(self),
        }  # fmt: skip


@dataclass(frozen=True)
class CardAnswer:
    """What fits a common card.

    Attributes:
        gib: Its memory.
        ways: Fastest first.
    """

    gib: int
    ways: tuple[Way, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        return {"gib": self.gib, "ways": [way.to_mapping() for way in self.ways]}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be trained, and on what.

    Attributes:
        family: Of the base.
        config: Its ``config.json``.
        setup: How it is trained, as far as memory allows.
        batch: Examples of an optimizer step.
        keeps: First and last layers that pruning keeps whole.
        multiple_of: Kept MLP channels are a multiple of it.
        fit_bytes: Of the device.
        speeds: Of the machine.
        head_params: Of a head that is stored beside a tied embedding.
    """

    family: Family
    config: dict[str, Any]
    setup: TrainingSetup
    batch: int
    keeps: tuple[int, int]
    multiple_of: int
    fit_bytes: int
    speeds: Speeds
    head_params: int = 0

    def in_precision(self, precision: Literal["bf16", "nf4"]) -> "Question":
        """The same in one precision, at a micro-batch of at most the batch."""
        quantize: Literal["nf4"] | None = "nf4" if precision == "nf4" else None
        setup, _ = micro_batches(replace(self.setup, quantize=quantize), self.batch)
        return replace(self, setup=setup)

    def smaller_setups(self) -> Iterator[TrainingSetup]:
        """The setup, then those that take less memory and more time."""
        checkpointing = replace(self.setup, gradient_checkpointing=True)
        yield from dict.fromkeys((self.setup, checkpointing, replace(checkpointing, micro_batch=1)))

    def with_head(self, memory: TrainingMemory) -> TrainingMemory:
        """A memory with the head that the config does not tell of."""
        head_bytes = self.head_params * self.setup.compute_bytes
        return replace(memory, weights=memory.weights + head_bytes)


def fitting_ways(asked: Question) -> list[Way]:
    """The ways that fit, fastest first; of those that take as long, exact ones, and least RAM.

    Args:
        asked: What is to be trained, and on what.
    """
    ways = []
    for precision in _PRECISIONS:
        mine = asked.in_precision(precision)
        whole = _resident(mine)
        # What the device holds whole gains nothing by pruning or by layers that come and go.
        ways += [whole] if whole is not None else [*_pruned(mine), *_streamed(mine)]
    return sorted(ways, key=lambda way: (way.seconds, not way.exact, way.host_bytes))


def _resident(asked: Question) -> Way | None:
    for setup in asked.smaller_setups():
        memory = asked.with_head(training_memory(asked.family, asked.config, setup))
        if memory.fits(asked.fit_bytes):
            return _computed(asked, asked.config, setup, memory, "resident", 0.0)
    return None


def _pruned(asked: Question) -> Iterator[Way]:
    """At the smallest ratio, which checkpointing makes smaller still."""
    _, *smaller = asked.smaller_setups()
    for setup in smaller or [asked.setup]:
        found = _smallest_ratio(asked, setup)
        if found is not None:
            hundredths, config, memory = found
            yield _computed(asked, config, setup, memory, "pruned", hundredths / 100)
            return


def _smallest_ratio(
    asked: Question, setup: TrainingSetup
) -> tuple[int, dict[str, Any], TrainingMemory] | None:
    geometry = asked.family.geometry(asked.config)

    def at(hundredths: int) -> tuple[dict[str, Any], TrainingMemory]:
        widths = layer_widths(geometry, hundredths / 100, *asked.keeps, asked.multiple_of)
        config = pruned_config(asked.config, geometry, widths)
        return config, asked.with_head(training_memory(asked.family, config, setup))

    def settled(hundredths: int) -> bool:
        try:
            return at(hundredths)[1].fits(asked.fit_bytes)
        except UsageError:  # nothing would be left of a layer, nor at any larger ratio
            return True

    first = bisect_left(range(1, _MOST_HUNDREDTHS + 1), True, key=settled) + 1
    if first > _MOST_HUNDREDTHS:
        return None
    try:
        return first, *at(first)
    except UsageError:
        return None


def _streamed(asked: Question) -> Iterator[Way]:
    family, config = asked.family, asked.config
    layers = layer_bytes(family, config, asked.setup)
    tried = (
        (setup, offload)
        for setup in dict.fromkeys((asked.setup, replace(asked.setup, micro_batch=1)))
        for offload in (False, True)
    )
    for setup, offload in tried:
        setup, count = micro_batches(setup, asked.batch)
        how: dict[str, Any] = {"offload_activations": offload}
        memory = streamed_training_memory(family, config, setup, count, host_copies=True, **how)
        total = asked.with_head(memory).total
        if total > asked.fit_bytes * USABLE_SHARE:
            continue
        # Layers that the device has room for stay there, as in training.
        stay = int((asked.fit_bytes * USABLE_SHARE - total) // max(layers))
        how["stay"] = min(stay, len(layers) - 1)
        copied = step_traffic(family, config, setup, count, host_copies=True, **how)
        yield Way(
            kind="streamed",
            precision="nf4" if setup.quantize else "bf16",
            micro_batch=setup.micro_batch,
            gradient_checkpointing=True,
            offload_activations=offload,
            training_bytes=total,
            host_bytes=memory.host - sum(layers[: how["stay"]]),
            params=account.count_params(family, config).total,
            seconds=asked.speeds.seconds(copied),
            disk_seconds=asked.speeds.seconds(step_traffic(family, config, setup, count, **how)),
        )
        return


def _computed(
    asked: Question,
    config: dict[str, Any],
    setup: TrainingSetup,
    memory: TrainingMemory,
    kind: Kind,
    ratio: float,
) -> Way:
    """A way whose model is on the device whole: it computes, and starts what is computed."""
    one, count = micro_batches(setup, asked.batch)
    step = step_traffic(asked.family, config, one, count)
    flops, starts = float(step.flops), step.layer_starts
    if not setup.gradient_checkpointing:
        flops *= _WITHOUT_RECOMPUTING
        starts *= _STARTS_WITHOUT_RECOMPUTING
    return Way(
        kind=kind,
        precision="nf4" if setup.quantize else "bf16",
        ratio=ratio,
        multiple_of=asked.multiple_of if ratio else 1,
        micro_batch=setup.micro_batch,
        gradient_checkpointing=setup.gradient_checkpointing,
        training_bytes=memory.total,
        params=account.count_params(asked.family, config).total,
        seconds=max(flops / asked.speeds.flops, starts * asked.speeds.start_seconds),
    )
