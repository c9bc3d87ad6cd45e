"""How to prune: the settings, and which of them go together."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self

from loram_cli.checkpoint.low_bit import (
    BITS,
    GROUP_MULTIPLE,
    GROUP_SIZE,
    LARGEST_GROUP,
    CodeKind,
    LowBit,
)
from loram_cli.errors import UsageError
from loram_cli.pruning.experts import ExpertImportance
from loram_cli.pruning.strategies import DEFAULT, STRATEGIES, strategy_named, summaries
from loram_cli.pruning.strategy import Strategy
from loram_cli.schema import Bytes, Params, Spec, flag, setting
from loram_cli.stages.fit.spec import (
    CHECKPOINTING_HELP,
    DEVICE_FORM,
    DEVICE_HELP,
    FORCE_HELP,
    HIGHEST_SEED,
    OUT_HELP,
    RANK_HELP,
    SEED_HELP,
    Quantization,
)
from loram_cli.units import GIB

# The ways to say how much goes; one of them is given, or the strategy's own ratio is taken.
AMOUNTS = ("ratio", "plan", "target_params", "fit_memory")
Importance = Literal[
    "taylor", "l2", "wanda", "obs", "sparsegpt", "cosine", "svd", "gptq", "yaqa", "nearest"
]

# What needs text, and what for.
CALIBRATED = {
    "taylor": "ranks by gradients on text",
    "wanda": "ranks by activations on text",
    "obs": "ranks by activations on text",
    "cosine": "ranks by hidden states on text",
    "sparsegpt": "updates on text",
    "gptq": "updates on text",
    "yaqa": "updates on text, by gradients as well",
    "svd": "weighs errors by activations on text",
}
# How experts may be ranked on text.
EXPERTS_CALIBRATED = ("reap", "frequency", "taylor")
# What a budget of memory depends on.
TRAINING = ("quantize", "rank", "micro_batch", "max_length", "gradient_checkpointing")
# What says how heads and channels go, so that it is no longer open which way to take.
_OF_GROUPS = ("importance", "scope", "multiple_of", "keep_first", "keep_last", "uniform")
# What only makes sense where shapes shrink, with the value that asks for nothing.
_SHRINKING = {
    "plan": None, "target_params": None, "fit_memory": None, "scope": "layer", "multiple_of": 1,
    "experts_ratio": None, "experts_importance": None,
    "uniform": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PruneSpec(Spec):
    """How to prune."""

    model: Path = setting(
        help="The base's directory.", flag="", place=True, in_key=False, private=True
    )
    source: Path | None = setting(
        None,
        help="lowbit: an output of prune or align to round, not the base itself.",
        flag="--in",
        place=True,
        in_key=False,
        private=True,
    )
    out: Path = setting(help=OUT_HELP, place=True, in_key=False, private=True)
    strategy: str | None = setting(
        None,
        help=f"{summaries()}.",
        choices=lambda: STRATEGIES,
        default_text=f"{DEFAULT}; with --fit-memory the best that fits",
    )
    ratio: float | None = setting(
        None,
        help="Share of groups to drop in each pruned layer, of layers to drop, or of weights to "
        "zero.",
        default_text="0.65; 0.5 for semi and depth; none for lowbit",
        above=0,
        below=1,
    )
    plan: Path | None = setting(
        None,
        help="Instead of --ratio: a YAML or JSON file with ratios for layers.",
        in_key=False,
    )
    target_params: Params | None = setting(
        None,
        help="Instead of --ratio: parameters to get down to, such as 6B.",
        at_least=1,
    )
    fit_memory: Bytes | None = setting(
        None,
        help="Instead of --ratio: memory of the card to train on, such as 24GiB; without "
        "--strategy, the way that kept most of full LoRA's gain where it was measured.",
        at_least=1,
    )
    experts_ratio: float | None = setting(
        None,
        help="Share of experts to drop in every layer that has them; alone, nothing else goes.",
        above=0,
        below=1,
        in_key="changed",
    )
    experts_importance: ExpertImportance | None = setting(
        None,
        help="reap: router weight times output norm; frequency: tokens; taylor: change of the "
        "loss; rand: drawn.",
        default_text="reap; rand with --strategy rand",
        in_key="changed",
    )
    quantize: Quantization | None = setting(
        None, help="With --fit-memory: nf4 where training will hold the weights in 4 bits."
    )
    rank: int = setting(8, help=f"With --fit-memory: {RANK_HELP}", at_least=1)
    micro_batch: int = setting(4, help="With --fit-memory: examples per pass.", at_least=1)
    max_length: int = setting(512, help="With --fit-memory: tokens per example.", at_least=1)
    gradient_checkpointing: bool = setting(
        False, help=f"With --fit-memory: {CHECKPOINTING_HELP.lower()}"
    )
    scope: Literal["layer", "global"] = setting(
        "layer",
        help="layer: an even share of each; global: groups of all layers ranked together.",
    )
    multiple_of: int = setting(
        1, help="Round kept MLP channels up to a multiple: 64 suits GPUs.", at_least=1
    )
    keep_first: int = setting(4, help="First layers kept whole (not unst, semi).", at_least=0)
    keep_last: int = setting(2, help="Last layers kept whole (not unst, semi).", at_least=0)
    uniform: bool = setting(
        False,
        help="Spread the same budget over all layers alike: stock libraries load the output.",
        in_key="changed",
    )
    bits: int = setting(
        3, help="lowbit: bits of a weight, 2 to 4.", at_least=BITS[0], at_most=BITS[-1],
        in_key="changed",
    )  # fmt: skip
    group_size: int = setting(
        GROUP_SIZE,
        help="lowbit: neighbours that share a step of a byte; a multiple of 8.",
        at_least=GROUP_MULTIPLE,
        at_most=LARGEST_GROUP,
        in_key="changed",
    )
    codes: CodeKind = setting(
        "grid",
        help="lowbit: grid: equal steps; trellis: values that depend on the codes before as well; "
        "about half the error, slower to make.",
        in_key="changed",
    )
    importance: Importance | None = setting(
        None,
        help="taylor, wanda or obs (stru), sparsegpt (unst, semi), cosine (depth), svd (lowrank), "
        "gptq, yaqa (lowbit), or l2, nearest (no data).",
        default_text="the strategy's first",
    )
    calibration: str | None = setting(
        None,
        help="Text to rank or update on: files, folders or data set ids, with weights if several; "
        "the training data ranks best.",
    )
    calibration_samples: int | None = setting(
        None,
        help="Windows of text.",
        default_text="taylor 10, sparsegpt 128, gptq and yaqa 64, others 32",
        at_least=1,
    )
    calibration_length: int | None = setting(
        None,
        help="Tokens per window.",
        default_text="taylor 128, sparsegpt 2048, gptq and yaqa 384, others 512",
        at_least=2,
    )
    calibration_memory: Bytes = setting(
        Bytes(4 * GIB),
        help="Memory for activations; the rest goes to disk.",
        at_least=0,
        in_key=False,
    )
    dampening: float = setting(
        0.01,
        help="sparsegpt, gptq, yaqa, obs, svd: share of the Hessian's mean diagonal.",
        at_least=0,
    )
    block_columns: int = setting(128, help="sparsegpt: columns per update.", at_least=1)
    max_shard_bytes: Bytes = setting(
        Bytes(5 * 10**9), help="Size of a shard of the output at most.", at_least=1, private=True
    )
    device: str | None = setting(
        None, help=DEVICE_HELP, form=DEVICE_FORM, in_key=False, private=True
    )
    seed: int = setting(42, help=SEED_HELP, at_least=0, at_most=HIGHEST_SEED)
    force: bool = setting(
        False, help=FORCE_HELP, place=True, switch=True, in_key=False, private=True
    )

    def settled(self) -> Self:
        """With the strategy, and with its ratio where nothing says how much goes."""
        if self.picks_way:
            return self
        if any(getattr(self, name) is not None for name in (*AMOUNTS, "experts_ratio")):
            return self if self.strategy else replace(self, strategy=self.strategy_name)
        return replace(self, strategy=self.strategy_name, ratio=self.chosen_strategy.ratio)

    @property
    def strategy_name(self) -> str:
        """The strategy, told or not."""
        return self.strategy or DEFAULT

    @property
    def picks_way(self) -> bool:
        """Whether only a memory is told, and the way to meet it is open."""
        defaults = {field.name: field.default for field in fields(self)}
        told = any(getattr(self, name) != defaults[name] for name in ("strategy", *_OF_GROUPS))
        return self.fit_memory is not None and not told

    @property
    def kept_whole(self) -> tuple[int, int]:
        """First and last layers that lose nothing; none where all are pruned alike."""
        return (0, 0) if self.uniform else (self.keep_first, self.keep_last)

    @property
    def read(self) -> Path:
        """The directory to prune: the base's, or what was made of it."""
        return self.source or self.model

    @property
    def chosen_strategy(self) -> Strategy:
        """The strategy's own file."""
        return strategy_named(self.strategy_name)

    @property
    def rounds_weights(self) -> bool:
        """Whether weights are rounded to few bits, and shapes stay."""
        return self.chosen_strategy.rounds

    @property
    def low_bit(self) -> LowBit | None:
        """How weights are rounded; None for a strategy that rounds none."""
        if not self.rounds_weights:
            return None
        return LowBit(self.bits, self.group_size, self.codes)

    @property
    def zeroes_weights(self) -> bool:
        """Whether single weights become zero, and shapes stay."""
        return self.chosen_strategy.zeroes_weights

    @property
    def experts_only(self) -> bool:
        """Whether heads and channels all stay."""
        return self.experts_ratio is not None and all(
            getattr(self, name) is None for name in AMOUNTS
        )

    @property
    def experts_method(self) -> str | None:
        """How experts are ranked; None where all stay."""
        if self.experts_ratio is None:
            return None
        return self.experts_importance or ("rand" if self.strategy == "rand" else "reap")

    @property
    def method(self) -> str | None:
        """How heads, channels or weights that go are chosen; None where none is ranked."""
        if self.experts_only:
            return None
        return self.importance or next(iter(self.chosen_strategy.importances), None)

    @property
    def needs_calibration(self) -> bool:
        """Whether text is needed."""
        return self.method in CALIBRATED or self.experts_method in EXPERTS_CALIBRATED

    def check(self) -> None:
        """Refuse settings that do not go together.

        Raises:
            UsageError: Two ways to say how much goes, settings of another strategy, or no text
                where text is needed.
        """
        self._check_amount()
        self._check_strategy()
        self._check_experts()
        if self.needs_calibration and self.calibration is None:
            self._refuse_no_text()

    def _refuse_no_text(self) -> None:
        if self.picks_way:
            raise UsageError(
                "--fit-memory chooses among ways that read text, and no --calibration is given",
                "pass --calibration FILE: the data to train on is best",
            )
        if self.method not in CALIBRATED:
            raise UsageError(
                "--experts-ratio ranks experts on text, and no --calibration is given",
                "pass --calibration FILE, or --experts-importance rand, which needs no text",
            )
        without = [name for name in ("l2", "nearest") if name in self.chosen_strategy.importances]
        other = f", or --importance {without[0]}, which needs no text" if without else ""
        raise UsageError(
            f"--strategy {self.strategy_name} {CALIBRATED[self.method]}, and no --calibration is "
            "given",
            f"pass --calibration FILE{other}",
        )

    def _check_experts(self) -> None:
        if self.experts_ratio is None:
            if self.experts_importance is not None:
                raise UsageError(
                    "--experts-importance ranks experts, and none go", "add --experts-ratio"
                )
            return
        for name in ("target_params", "fit_memory"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"{flag(self, name)} finds a ratio of heads and channels, and goes without "
                    "--experts-ratio",
                    "pass only --experts-ratio, or both it and --ratio",
                )
        if self.scope == "global" and self.experts_method == "rand":
            raise UsageError(
                "--scope global ranks experts, and --experts-importance rand draws them",
                "pass --experts-importance reap, or leave --scope out",
            )
        if self.experts_only and self.importance is not None:
            raise UsageError(
                "--importance ranks heads and channels, and only experts go",
                "pass --experts-importance, or add --ratio",
            )

    def _check_amount(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) > 1:
            flags = " and ".join(flag(self, name) for name in given)
            raise UsageError(f"{flags} exclude each other", "pass one of them")
        defaults = {field.name: field.default for field in fields(self)}
        for name in TRAINING:
            if self.fit_memory is None and getattr(self, name) != defaults[name]:
                raise UsageError(
                    f"{flag(self, name)} tells --fit-memory how training will go; pruning itself "
                    "does not depend on it",
                    "pass it to 'loram train', or add --fit-memory",
                )
        if self.scope == "global" and self.plan is not None:
            raise UsageError(
                "--scope global shares one budget among the layers, and --plan says what each "
                "loses",
                "pass one of them",
            )
        if self.uniform and (self.plan is not None or self.scope == "global"):
            other = "--plan" if self.plan is not None else "--scope global"
            raise UsageError(
                f"--uniform prunes all layers alike, and {other} tells them apart",
                "pass one of them",
            )

    def _check_strategy(self) -> None:
        strategy = self.chosen_strategy
        only = strategy.only_ratio
        if only is not None and self.ratio not in (None, only):
            raise UsageError(
                f"--strategy {self.strategy_name} with --ratio {self.ratio}: 2:4 zeroes two of "
                "every four weights",
                f"pass --ratio {only:g}, or --strategy unst",
            )
        if self.importance is not None and self.importance not in strategy.importances:
            raise UsageError(
                f"--importance {self.importance} does not go with --strategy {self.strategy_name}",
                f"it takes {' or '.join(strategy.importances) or 'none: groups are drawn'}",
            )
        if strategy.zeros_in_four and self.block_columns % 4:
            raise UsageError(
                f"--block-columns {self.block_columns} is no multiple of 4, as "
                f"--strategy {self.strategy_name} needs"
            )
        self._check_bits(strategy)
        if strategy.keep is None:
            why = _shapes_stay(strategy)
            for name, nothing in _SHRINKING.items():
                if getattr(self, name) != nothing:
                    asked = "--scope global" if name == "scope" else flag(self, name)
                    raise UsageError(
                        f"{asked} does not go with --strategy {self.strategy_name}: {why}",
                        f"pass {'--bits' if strategy.rounds else '--ratio'}, or --strategy stru",
                    )
        if self.scope == "global" and not strategy.importances:
            raise UsageError(
                f"--scope global ranks groups, and --strategy {self.strategy_name} draws them",
                "pass --strategy stru, or --plan FILE for ratios of your own",
            )

    def _check_bits(self, strategy: Strategy) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("bits", "group_size", "codes"):
            if not strategy.rounds and getattr(self, name) != defaults[name]:
                raise UsageError(
                    f"{flag(self, name)} does not go with --strategy {self.strategy_name}",
                    "pass --strategy lowbit; with --in DIR it rounds an output of prune or align",
                )
        if self.source is not None and not strategy.rounds:
            raise UsageError(
                f"--in {self.source} does not go with --strategy {self.strategy_name}, which "
                "prunes a base",
                "pass --model DIR, or --strategy lowbit",
            )
        if self.group_size % GROUP_MULTIPLE:
            raise UsageError(
                f"--group-size {self.group_size} is no multiple of {GROUP_MULTIPLE}",
            )
        if strategy.rounds and self.ratio is not None:
            raise UsageError(
                f"--ratio does not go with --strategy {self.strategy_name}: it drops and zeroes "
                "nothing",
                "pass --bits",
            )


def _shapes_stay(strategy: Strategy) -> str:
    """Why nothing shrinks by widths, in words."""
    if strategy.rounds:
        return "shapes stay"
    if strategy.factors_linears:
        return "it leaves the widths as they are"
    return "it drops whole layers" if strategy.drops_layers else "shapes and memory stay"
