"""The rows, and what each one does in its process."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

GROUPS = {
    "a": "the demo recipe on the GPU",
    "b": "Table 8 of the paper",
    "c": "70B on one card",
    "d": "predicted against measured peak",
    "e": "13B within 8 GiB for weights: layers read as they run",
    "f": "peers on the same card, weights and batch",
    "g": "prune by Taylor, and reconstruct",
    "h": "70B layer by layer: exact QLoRA from pinned memory",
}
# Worked out from rows b and c; it has no process.
DERIVED = "d"
TINY = "tiny"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        name: Its group's letter and a number.
        label: For the table.
        kind: Which function of :mod:`.work` measures it.
        arguments: Of that function.
        seconds: What it is expected to take; it is not begun where less is left.
        limit_seconds: After these it is ended.
        checkpoint: The random checkpoint that it reads, see :data:`CHECKPOINTS`.
    """

    name: str
    label: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 20.0
    limit_seconds: float = 90.0
    checkpoint: str | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for the process that measures it."""
        return asdict(self)


# Name, preset and number of layers (None for all) of the random checkpoints on disk, in the order
# in which they are needed.
CHECKPOINTS = {
    "70b-layers": ("llama2-70b", 4),
    "7b": ("llama2-7b", None),
    "13b-layers": ("llama2-13b", 6),
    "13b": ("llama2-13b", None),
}
_PLAIN = {"cross_entropy": "full", "micro_batch": 4, "length": 512, "steps": 6}
_SAVING = {**_PLAIN, "cross_entropy": "chunked", "gradient_checkpointing": True}
_LARGE = {**_SAVING, "micro_batch": 1, "optimizer": "paged_adamw_8bit"}
_TABLE_8 = (
    ("llama2-7b", "7B LoRA"),
    ("llama2-13b", "13B LoRA"),
    ("llama2-13b:0.65", "13B LoRAM 0.65"),
    ("llama2-13b:0.65:x64", "13B LoRAM 0.65 x64"),
)
_OFFLOAD = {"budget_bytes": 8 * GIB, "rows": 8, "length": 512, "new_tokens": 6}
_OFFLOAD_WAYS = (
    ("whole", "the whole model", 27),
    ("pageable", "8 GiB, pageable memory, same stream", 75),
    ("overlapped", "8 GiB, pinned memory, own stream", 60),
)
# Four of the 70B's layers in NF4 come and go; the row tells what all 80 take.
_STREAM = {"micro_batch": 4, "length": 512, "steps": 2, "full_layers": 80}
# With one example a step the bus decides, with many the arithmetic; and the seconds of each row.
_STREAM_BATCHES = {1: 13, 32: 20}
_PEERS = (
    ("trainer", "PEFT, transformers' Trainer"),
    ("trainer-checkpointing", "PEFT, Trainer, checkpointing"),
    ("trl", "PEFT, TRL's SFTTrainer with its memory savers, head left out"),
)


def card_rows() -> list[Row]:
    """All rows of an 80 GB card; ``seconds`` are those of an H100.

    What has no figure yet and what others compare with comes first, the demo last: its steps are so
    small that they tell how fast Python starts kernels.
    """
    return [
        *_peers(),
        *_streams(),
        *_prunings(),
        *_offloads(),
        *_table_8(),
        *_seventies(),
        *_demos(),
    ]


def _demos() -> Iterator[Row]:
    yield Row(name="a1", label="demo, bf16", kind="demo", arguments={"quantize": None}, seconds=130,
              limit_seconds=180)  # fmt: skip
    yield Row(name="a2", label="demo, NF4", kind="demo", arguments={"quantize": "nf4"}, seconds=70,
              limit_seconds=100)  # fmt: skip


def _table_8() -> Iterator[Row]:
    rows = [
        (label + how, model, settings, 14.0)
        for how, settings in (("", _PLAIN), (", chunked + checkpointing", _SAVING))
        for model, label in _TABLE_8
    ]
    compiled = {**_PLAIN, "compile": True}
    rows += [(f"{label}, compiled", model, compiled, 30) for model, label in _TABLE_8[1::2]]
    return _trainings("b", rows)


def _seventies() -> Iterator[Row]:
    yield from _trainings(
        "c",
        [
            ("70B QLoRAM 0.85", "llama2-70b:0.85:nf4", _LARGE, 27),
            ("70B QLoRAM 0.95", "llama2-70b:0.95:nf4", _LARGE, 25),
        ],
    )
    yield Row(name="c3", label="Llama-3.1-70B for 24 GiB", kind="fitted", seconds=25,
              arguments={**_LARGE, "preset": "llama3.1-70b", "memory": "24GiB", "device": "cuda"},
              )  # fmt: skip
    yield Row(name="c4", label="70B QLoRAM 0.85 x64, compiled", kind="train", seconds=45,
              arguments={**_LARGE, "row": "llama2-70b:0.85:nf4:x64", "device": "cuda",
                         "compile": True})  # fmt: skip


def _offloads() -> Iterator[Row]:
    for number, (way, label, seconds) in enumerate(_OFFLOAD_WAYS, 1):
        yield Row(name=f"e{number}", label=label, kind="offload", checkpoint="13b",
                  arguments={**_OFFLOAD, "way": way}, seconds=seconds, limit_seconds=120)  # fmt: skip


def _peers() -> Iterator[Row]:
    for number, (way, label) in enumerate(_PEERS, 1):
        yield Row(name=f"f{number}", label=f"7B LoRA, {label}", kind="peer", seconds=15,
                  arguments={**_PLAIN, "row": "llama2-7b", "way": way})  # fmt: skip


def _prunings() -> Iterator[Row]:
    yield Row(name="g1", label="prune by Taylor, 7B", kind="taylor", checkpoint="7b", seconds=40,
              limit_seconds=150, arguments={"ratio": 0.65, "samples": 16, "length": 512})  # fmt: skip
    yield Row(name="g2", label="reconstruct four layers of 13B", kind="reconstruct", seconds=30,
              limit_seconds=150, checkpoint="13b-layers",
              arguments={"ratio": 0.65, "samples": 64, "length": 512})  # fmt: skip


def _streams() -> Iterator[Row]:
    for number, (batch, seconds) in enumerate(_STREAM_BATCHES.items(), 1):
        yield Row(name=f"h{number}", label=f"70B QLoRA, batch {batch}", kind="stream",
                  checkpoint="70b-layers", arguments={**_STREAM, "batch": batch}, seconds=seconds,
                  limit_seconds=120)  # fmt: skip


def rehearsal_rows() -> list[Row]:
    """The same path at shapes that a CPU runs in seconds: one row of each kind and each way."""
    small = {"micro_batch": 2, "length": 16, "steps": 2, "optimizer": "adamw", "device": "cpu"}
    plain, saving = {**_PLAIN, **small}, {**_SAVING, **small, "micro_batch": 1}
    offload = {"budget_bytes": 12 * 2**20, "rows": 2, "length": 16, "new_tokens": 3}
    prune = {"ratio": 0.5, "samples": 4, "length": 32}
    rows = [
        Row(name="a1", label="demo, bf16", kind="demo", arguments={"quantize": None, "tiny": True}),
        Row(name="a2", label="demo, NF4", kind="demo", arguments={"quantize": "nf4", "tiny": True}),
        Row(name="b1", label="LoRA", kind="train", arguments={**plain, "row": TINY}),
        Row(name="b2", label="LoRAM 0.65 x8, chunked + checkpointing", kind="train",
            arguments={**saving, "row": f"{TINY}:0.65:x8"}),
        Row(name="c1", label="QLoRAM 0.85", kind="train",
            arguments={**saving, "row": f"{TINY}:0.85:nf4"}),
        Row(name="c2", label="Llama-2-7B for 6 GiB, measured on a tiny one", kind="fitted",
            arguments={**saving, "preset": "llama2-7b", "memory": "6GiB", "measured": TINY}),
    ]  # fmt: skip
    for way, label, _ in _OFFLOAD_WAYS:
        rows.append(
            Row(name=f"e{_count(rows, 'e')}", label=label, kind="offload", checkpoint=TINY,
                arguments={**offload, "way": way})
        )  # fmt: skip
    for way, label in _PEERS[1:]:
        rows.append(
            Row(name=f"f{_count(rows, 'f')}", label=label, kind="peer",
                arguments={**plain, "row": TINY, "way": way})
        )  # fmt: skip
    for kind in ("taylor", "reconstruct"):
        rows.append(
            Row(name=f"g{_count(rows, 'g')}", label=kind, kind=kind, checkpoint=TINY,
                arguments=prune)
        )  # fmt: skip
    rows.append(
        Row(name="h1", label="QLoRA, batch 4", kind="stream", checkpoint=TINY,
            arguments={**_STREAM, "batch": 4, "micro_batch": 2, "length": 16, "steps": 1})
    )  # fmt: skip
    return rows


def chosen(rows: list[Row], only: list[str]) -> list[Row]:
    """The rows that were asked for, by name or by letter; all where none was.

    Args:
        rows: All.
        only: Such as ``b`` or ``e2``; ``d`` needs the rows that it is worked out from.

    Raises:
        ValueError: There is no such row.
    """
    wanted = {name for one in only for name in (("b", "c") if one == DERIVED else (one,))}
    known = {row.name for row in rows} | {row.name[0] for row in rows}
    if wanted - known:
        raise ValueError(f"no row {', '.join(sorted(wanted - known))}")
    return [row for row in rows if not wanted or {row.name, row.name[0]} & wanted]


def _trainings(letter: str, rows: list[tuple[str, str, dict[str, Any], float]]) -> Iterator[Row]:
    for number, (label, model, settings, seconds) in enumerate(rows, 1):
        yield Row(name=f"{letter}{number}", label=label, kind="train", seconds=seconds,
                  arguments={**settings, "row": model, "device": "cuda"})  # fmt: skip


def _count(rows: list[Row], letter: str) -> int:
    return 1 + sum(row.name.startswith(letter) for row in rows)


def needed_checkpoints(rows: list[Row]) -> Iterator[str]:
    """The checkpoints that rows read, each once, in order."""
    return iter(dict.fromkeys(row.checkpoint for row in rows if row.checkpoint))
