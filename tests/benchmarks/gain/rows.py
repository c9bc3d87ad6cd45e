"""The rows of the bench: how each small model is made, as flags of the product's commands."""

from dataclasses import dataclass

Flags = tuple[str, ...]

FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train.

    Attributes:
        name: Short, for ``--only`` and the results file.
        label: For the table.
        prune: Flags of ``loram prune``; None trains on the base itself.
        align: Flags of ``loram align``; None leaves alignment out.
        train: Further flags of ``loram train``.
        polish: Exact steps on the full model after recovery, each count a figure of its own.
        quick: Whether ``--quick`` runs it.
        decides: Whether it runs with every seed; other rows run with the first.
    """

    name: str
    label: str
    prune: Flags | None = None
    align: Flags | None = None
    train: Flags = ()
    polish: tuple[int, ...] = ()
    quick: bool = False
    decides: bool = False


# ``{text}``, ``{train}`` and ``{mixed}`` become the bench's data: general text, the training data,
# and half of each.
_WIKI_8K = ("--data", "{text}", "--method", "reconstruct", "--calibration-samples", "16")
_MIXED_32K = ("--data", "{mixed}", "--method", "reconstruct", "--calibration-samples", "64")


def _stru(ratio: float) -> Flags:
    return ("--strategy", "stru", "--ratio", str(ratio), "--calibration", "{train}")


def _rand(ratio: float) -> Flags:
    return ("--strategy", "rand", "--ratio", str(ratio))


def _short(flags: Flags) -> str:
    return flags[flags.index("--strategy") + 1]


ROWS: tuple[Row, ...] = (
    Row(name=FULL, label="base; full LoRA", polish=(5, 10), quick=True, decides=True),
    Row(name="nf4", label="NF4 (QLoRA)", train=("--quantize", "nf4"), quick=True, decides=True),
    Row(
        name="stru-0.65-wiki-8k",
        label="stru 0.65, reconstruct, 8k tokens of general text",
        prune=("--strategy", "stru", "--ratio", "0.65", "--calibration", "{text}"),
        align=_WIKI_8K,
    ),
    Row(
        name="stru-0.65-mixed-32k",
        label="stru 0.65, reconstruct, 32k tokens, half of them training data",
        prune=_stru(0.65),
        align=_MIXED_32K,
        quick=True,
    ),
)


def named(names: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of these names, in the table's order.

    Raises:
        SystemExit: There is no such row.
    """
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: no such row; the rows: {', '.join(known)}")
    return tuple(row for row in ROWS if row.name in names)
