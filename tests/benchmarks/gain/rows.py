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
        then: What is done to that small model before training: a command (``prune`` rounds it,
            ``align`` fits it again) and its flags, each on what the one before it made.
        train: Further flags of ``loram train``.
        scaled: Whether the recovered update is scaled (``recover --fit-scale``) as well.
        polish: Whether exact steps on the full model follow recovery, scaled where it is.
        quick: Whether ``--quick`` runs it.
        decides: Whether it runs with every seed; other rows run with the first.
        choosable: Whether ``prune --fit-memory`` may take it: not where alignment takes flags that
            it does not say.
    """

    name: str
    label: str
    prune: Flags | None = None
    align: Flags | None = None
    then: tuple[tuple[str, Flags], ...] = ()
    train: Flags = ()
    scaled: bool = False
    polish: bool = False
    quick: bool = False
    decides: bool = False
    choosable: bool = True

    def deciding(self) -> list[object]:
        """What its figures depend on."""
        return [self.prune, self.align, self.then, self.train]


# ``{text}``, ``{train}`` and ``{mixed}`` become the bench's data: general text, the training data,
# and half of the tokens from each; ``{precision}`` that of its trainings.
_WIKI_8K = ("--data", "{text}", "--method", "reconstruct", "--calibration-samples", "16")


def _mixed(samples: int) -> Flags:
    return ("--data", "{mixed}", "--method", "reconstruct", "--calibration-samples", str(samples))


_MIXED_32K = _mixed(64)


def _steps(rate: str, *more: str) -> Flags:
    return (
        "--steps", "40", "--batch", "4", "--micro-batch", "4", "--warmup-steps", "4",
        "--learning-rate", rate, "--precision", "{precision}", "--eval-rows", "4", *more,
    )  # fmt: skip


_STEPS = _steps("6e-4")
_DISTILLED = ("--data", "{mixed}", "--method", "distill", *_STEPS)


def _both(steps: Flags) -> Flags:
    return (
        "--data", "{mixed}", "--method", "reconstruct,distill", "--calibration-samples", "64",
        *steps,
    )  # fmt: skip


# Of what stays near the base's weights: norms and biases, or factors that are merged.
_NORMS = _steps("2e-3", "--trained", "norms")
_FACTORS = _steps("5e-4", "--trained", "lora")
_NF4 = ("--quantize", "nf4")
_TRAIN_131K = (
    "--data", "{train}", "--method", "reconstruct", "--calibration-samples", "256",
)  # fmt: skip
_TRAIN_262K = (*_TRAIN_131K[:-1], "512")
_TRAIN_131K_NORMS = (
    "--data", "{train}", "--method", "reconstruct,distill", "--calibration-samples", "256", *_NORMS,
)  # fmt: skip
# Of few bits: gradient steps on one layer at a time.
_BLOCKS = (
    "--data", "{train}", "--method", "reconstruct", "--calibration-samples", "64",
)  # fmt: skip
_LOW_RANK = ("--strategy", "lowrank", "--ratio", "0.65", "--calibration", "{train}")


def _stru(ratio: float, importance: str = "obs") -> Flags:
    return (
        "--strategy", "stru", "--ratio", str(ratio), "--calibration", "{train}",
        "--importance", importance,
    )  # fmt: skip


def _low_bit(bits: int, *how: str, group_size: int = 48) -> Flags:
    # More text for yaqa: gradients tell more of it than inputs do.
    samples = 64 if "yaqa" in how else 24
    return (
        "--strategy", "lowbit", "--bits", str(bits), "--group-size", str(group_size),
        "--calibration", "{train}", *how, "--calibration-samples", str(samples), "--calibration-length", "256",
    )  # fmt: skip


def _both_sides(bits: int) -> Flags:
    return _low_bit(bits, "--importance", "yaqa")


def _trellis(bits: int, importance: str) -> Flags:
    return _low_bit(bits, "--codes", "trellis", "--importance", importance, group_size=64)


def _depth(ratio: float) -> Flags:
    return ("--strategy", "depth", "--ratio", str(ratio), "--calibration", "{train}")


def _rand(ratio: float) -> Flags:
    return ("--strategy", "rand", "--ratio", str(ratio))


_MADE = (
    Row(name=FULL, label="base; full LoRA", polish=True, quick=True, decides=True),
    Row(name="nf4", label="NF4 (QLoRA)", train=_NF4, quick=True, decides=True),
    Row(
        name="stru-0.65-wiki-8k",
        label="stru 0.65 by taylor, reconstruct, 8k tokens of general text",
        prune=(
            "--strategy",
            "stru",
            "--ratio",
            "0.65",
            "--calibration",
            "{text}",
            "--importance",
            "taylor",
        ),
        align=_WIKI_8K,
    ),
    Row(
        name="stru-0.65-mixed-32k",
        label="stru 0.65 by taylor, reconstruct, 32k tokens, half of them training data",
        prune=_stru(0.65, "taylor"),
        align=_MIXED_32K,
    ),
    Row(
        name="stru-0.65-distill",
        label="stru 0.65 by taylor, reconstruct, then distill, 115k tokens",
        prune=_stru(0.65, "taylor"),
        align=_both(_STEPS),
    ),
)

_OTHERS = (
    Row(
        name="stru-0.65-obs",
        label="stru 0.65 by obs, reconstruct, 32k tokens, half of them training data",
        prune=_stru(0.65),
        align=_MIXED_32K,
        scaled=True,
        polish=True,
        quick=True,
        decides=True,
    ),
    Row(
        name="stru-0.65-obs-131k",
        label="stru 0.65 by obs, reconstruct, 131k tokens of training data",
        prune=_stru(0.65),
        align=_TRAIN_131K,
        choosable=False,
        scaled=True,
        polish=True,
        decides=True,
    ),
    Row(
        name="stru-0.65-obs-262k",
        label="stru 0.65 by obs, reconstruct, 262k tokens of training data",
        prune=_stru(0.65),
        align=_TRAIN_262K,
        choosable=False,
        scaled=True,
    ),
    Row(
        name="stru-0.65-obs-131k-norms",
        label="stru 0.65 by obs, reconstruct, 131k tokens of training data; distill norms alone",
        prune=_stru(0.65),
        align=_TRAIN_131K_NORMS,
        choosable=False,
        scaled=True,
        polish=True,
    ),
    Row(
        name="stru-0.65-obs-8k",
        label="stru 0.65 by obs, reconstruct, 8k tokens, half of them training data",
        prune=_stru(0.65),
        align=_mixed(16),
        scaled=True,
    ),
    *(
        Row(
            name=f"stru-0.65-obs-{name}",
            label=f"stru 0.65 by obs, reconstruct, then distill {what}, 115k tokens",
            prune=_stru(0.65),
            align=_both(steps),
            choosable=False,
            scaled=True,
        )
        for name, what, steps in (
            ("norms", "norms alone", _NORMS),
            ("factors", "factors of rank 16", _FACTORS),
            ("distill", "all weights", _STEPS),
        )
    ),
    Row(
        name="stru-0.65-wanda",
        label="stru 0.65 by wanda, reconstruct, 32k tokens",
        prune=_stru(0.65, "wanda"),
        align=_MIXED_32K,
    ),
    Row(
        name="stru-0.65-train-32k",
        label="stru 0.65 by taylor, reconstruct, 32k tokens of training data",
        prune=_stru(0.65, "taylor"),
        align=("--data", "{train}", *_MIXED_32K[2:]),
    ),
    Row(
        name="lowrank-0.65",
        label="lowrank 0.65, not aligned",
        prune=_LOW_RANK,
    ),
    Row(
        name="lowrank-0.65-distill",
        label="lowrank 0.65, distill, 82k tokens",
        prune=_LOW_RANK,
        align=_DISTILLED,
    ),
    Row(
        name="lowrank-0.65-nf4",
        label="lowrank 0.65, not aligned; NF4",
        prune=_LOW_RANK,
        train=_NF4,
    ),
    Row(
        name="depth-0.625",
        label="depth 0.625 (15 of 24 layers), not aligned",
        prune=_depth(0.625),
    ),
    Row(
        name="depth-0.625-distill",
        label="depth 0.625, distill, 82k tokens",
        prune=_depth(0.625),
        align=_DISTILLED,
        polish=True,
    ),
)

# Rounded by GPTQ on training data: as they are, and with codes, steps and norms distilled.
_ROUNDED = tuple(
    Row(
        name=f"lowbit-{bits}{suffix}",
        label=f"{bits} bits, {said}",
        prune=_low_bit(bits),
        align=align,
        scaled=bits == 2,
        polish=True,
        quick=bits == 3 and align is None,
        decides=True,
    )
    for bits in (3, 2)
    for suffix, said, align in (
        ("", "not aligned", None),
        ("-blocks", "reconstruct, 33k tokens of training data", _BLOCKS),
        ("-distill", "distill, 82k tokens", _DISTILLED),
    )
)

# Rounded so that errors cancel in what comes back as well.
_BOTH_SIDES = tuple(
    Row(
        name=f"lowbit-{bits}-yaqa{suffix}",
        label=f"{bits} bits by yaqa, {said}",
        prune=_both_sides(bits),
        align=align,
        scaled=bits == 2,
        polish=True,
        decides=align is None,
    )
    for bits in (3, 2)
    for suffix, said, align in (
        ("", "not aligned", None),
        ("-distill", "distill, 82k tokens", _DISTILLED),
    )
)

# Codes of a trellis: in groups of 64, whose byte holds a step only.
_ON_TRELLIS = (
    Row(
        name="lowbit-2-trellis-norms",
        label="2 bits on a trellis by yaqa, distill norms alone, 82k tokens",
        prune=_trellis(2, "yaqa"),
        align=("--data", "{mixed}", "--method", "distill", *_NORMS),
        choosable=False,
        scaled=True,
    ),
    *(
        Row(
            name=f"lowbit-{bits}-trellis",
            label=f"{bits} bits on a trellis by {importance}, not aligned",
            prune=_trellis(bits, importance),
            scaled=bits == 2,
            polish=True,
            quick=True,
            decides=True,
        )
        for bits, importance in ((3, "gptq"), (2, "yaqa"))
    ),
)

# Narrow and of few bits: pruned and fitted first, then rounded.
_NARROW_ROUNDED = tuple(
    Row(
        name=f"stru-{ratio:g}-lowbit-{bits}{suffix}",
        label=f"stru {ratio:g} by obs, reconstruct; then {bits} bits {said} by yaqa",
        prune=_stru(ratio),
        align=_MIXED_32K,
        then=(("prune", rounded),),
        scaled=True,
        polish=True,
        decides=bits == 2,
    )
    for ratio, bits, rounded, suffix, said in (
        (0.35, 2, _both_sides(2), "", "on a grid"),
        (0.35, 2, _trellis(2, "yaqa"), "-trellis", "on a trellis"),
        # Of one key/value head, which stays, and so of MLPs alone: as few bytes.
        (0.55, 2, _trellis(2, "yaqa"), "-trellis", "on a trellis"),
        (0.65, 3, _both_sides(3), "", "on a grid"),
    )
)

# Every ratio of stru and rand: as pruned, fitted, and in NF4 as well.
_RATIOS = tuple(
    Row(
        name=f"{name}-{ratio:g}{suffix}",
        label=f"{name} {ratio:g}, {said}",
        prune=flags(ratio),
        align=align,
        train=train,
        scaled=True,
    )
    for name, flags in (("stru", _stru), ("rand", _rand))
    for ratio in (0.2, 0.35, 0.5, 0.65)
    for suffix, said, align, train in (
        ("", "not aligned", None, ()),
        ("-fit", "reconstruct", _MIXED_32K, ()),
        ("-fit-nf4", "reconstruct; NF4", _MIXED_32K, _NF4),
    )
)

ROWS: tuple[Row, ...] = (
    *_MADE,
    *_OTHERS,
    *_ROUNDED,
    *_BOTH_SIDES,
    *_ON_TRELLIS,
    *_NARROW_ROUNDED,
    *_RATIOS,
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
