"""Memory report: what base, pruned and quantized models cost, from configs alone."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.prune.sparse import count_zeros
from loram_cli.tools.memory_rows import (
    BASE_NAME,
    FitAnswer,
    MemoryRow,
    Model,
    fit_answers,
    model_rows,
)

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family
    from loram_cli.memory.picture import Bar
    from loram_cli.memory.setup import TrainingSetup

Strategy = Literal["rand", "stru", "semi", "unst"]

# The ratios of Tables 4 and 5; 2:4 knows no other.
_DEFAULT_RATIOS: dict[str, tuple[float, ...]] = {
    "rand": (0.65, 0.75, 0.85, 0.95),
    "stru": (0.65, 0.75, 0.85, 0.95),
    "semi": (0.5,),
    "unst": (0.55,),
}


@dataclass(frozen=True, kw_only=True)
class MemoryReportSpec:
    """What to report on.

    Attributes:
        model: The base's directory, or its ``config.json``.
        preset: Name of an embedded config, in place of ``model``.
        pruned: A pruned or aligned directory of that base, reported as it is.
        ratios: Ratios to work out. Empty: those of the paper, or none where ``pruned`` is given.
        strategy: ``rand`` and ``stru`` narrow the layers, ``semi`` and ``unst`` zero weights.
        keep_first: Layers at the input side that stay whole (``rand`` and ``stru`` alone).
        keep_last: Layers at the output side that stay whole (``rand`` and ``stru`` alone).
        multiple_of: The channels that stay are a multiple of so many.
        rank: LoRA rank.
        targets: LoRA target modules; empty for every decoder linear and an untied head.
        dropout: LoRA dropout.
        micro_batch: Sequences per forward pass.
        length: Tokens per sequence.
        gradient_checkpointing: Keep layers' inputs alone.
        attention: The kernel; ``eager`` alone holds all attention weights, and ``auto`` is what
            the model trains with unless told.
        cross_entropy: ``chunked``, or ``full`` with all logits at once.
        optimizer: ``adamw`` or ``paged_adamw_8bit``.
        processes: That share the model out (``train --fsdp``); the figures are of each of them.
        fit_bytes: Also say which ratio and micro-batch fit so much memory.
    """

    model: Path | None = None
    preset: str | None = None
    pruned: Path | None = None
    ratios: tuple[float, ...] = ()
    strategy: Strategy = "stru"
    keep_first: int = 4
    keep_last: int = 2
    multiple_of: int = 1
    rank: int = 8
    targets: tuple[str, ...] = ()
    dropout: float = 0.05
    micro_batch: int = 4
    length: int = 512
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "flash", "eager"] = "auto"
    cross_entropy: Literal["full", "chunked"] = "chunked"
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    processes: int = 1
    fit_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.preset is None):
            raise UsageError(
                "memory-report needs a model directory or a preset, and not both",
                "pass --model DIR, or --preset llama2-70b",
            )
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise UsageError(f"--ratio {ratio} is outside (0, 1)")
            if self.strategy == "semi" and ratio != 0.5:
                raise UsageError(
                    f"--strategy semi with --ratio {ratio}: 2:4 zeroes two of every four weights",
                    "pass --ratio 0.5, or none",
                )
        if self.multiple_of > 1 and self.strategy in ("semi", "unst"):
            raise UsageError(f"--multiple-of does not go with --strategy {self.strategy}")
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} cannot be negative")
        for name in ("multiple_of", "rank", "micro_batch", "length", "processes"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is too low")
        if self.fit_bytes is not None and self.fit_bytes < 1:
            raise UsageError("--fit must be above 0")
        if self.processes > 1 and self.optimizer != "adamw":
            raise UsageError(
                f"--optimizer {self.optimizer} cannot work on the slices that --fsdp makes",
                "pass --optimizer adamw; its moments are shared out as well",
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout} is outside [0, 1)")

    @property
    def effective_ratios(self) -> tuple[float, ...]:
        """The ratios to work out."""
        if self.ratios or self.pruned is not None:
            return self.ratios
        return _DEFAULT_RATIOS[self.strategy]


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The report.

    Attributes:
        source: The base: a path, or ``preset NAME``.
        family: Its family.
        rank: LoRA rank.
        targets: LoRA target modules.
        setup: How the models are trained: micro-batch, length, gradient checkpointing and so on.
        rows: The base first, then every pruned model; each in bf16, then NF4.
        fit_bytes: The memory asked about, or None.
        fits: What fits it.
        notes: What the figures contain and what not.
    """

    source: str
    family: str
    rank: int
    targets: tuple[str, ...]
    setup: "TrainingSetup"
    rows: tuple[MemoryRow, ...]
    fit_bytes: int | None
    fits: tuple[FitAnswer, ...]
    notes: tuple[str, ...]

    @property
    def settings(self) -> str:
        """The setup in words."""
        setup = self.setup
        words = [f"micro-batch {setup.micro_batch}", f"{setup.length} tokens"]
        words += [f"{setup.attention} attention", f"{setup.cross_entropy} cross-entropy"]
        if setup.gradient_checkpointing:
            words.append("gradient checkpointing")
        if setup.optimizer != "adamw":
            words.append(setup.optimizer)
        if setup.processes > 1:
            words.append(f"each of {setup.processes} processes (FSDP)")
        return ", ".join(words)

    def bars(self) -> "list[Bar]":
        """The rows as bars, part by part."""
        return [row.bar() for row in self.rows]

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        plain = asdict(self)
        return {
            **plain,
            "targets": list(self.targets),
            "setup": {**plain["setup"], "targets": list(self.targets)},
            "rows": list(plain["rows"]),
            "fits": list(plain["fits"]),
            "notes": list(self.notes),
        }


def run(spec: MemoryReportSpec, reporter: Reporter) -> MemoryReport:
    """Work the report out. Weights are read only to count the zeros of a sparse directory.

    Raises:
        LoramError: A config is absent or unsound, or ``pruned`` is not of this base.
        UsageError: Unknown preset or LoRA target, or a ratio or keep flags that do not fit.
    """
    from loram_cli.arch.targets import lora_targets
    from loram_cli.memory.notes import report_notes

    source = f"preset {spec.preset}" if spec.preset is not None else str(spec.model)
    config = _base_config(spec)
    family = _checked_family(config, source)
    base = Model(BASE_NAME, config)
    setup = _setup(spec, config)
    ratios = spec.effective_ratios
    if config.get("per_layer_config"):
        if spec.ratios:
            raise UsageError(f"{source}: is pruned already", "pass the original base as --model")
        ratios = ()
    models = [base, *_narrowed_or_sparse(spec, family, config, ratios)]
    if spec.pruned is not None:
        models.append(_pruned_directory(spec.pruned, family, config, source, reporter))
    reporter.note(f"read {source}" + (f" and {spec.pruned}" if spec.pruned is not None else ""))
    return MemoryReport(
        source=source,
        family=family.family,
        rank=spec.rank,
        targets=lora_targets(
            family,
            tied_embeddings=family.geometry(config).tied_embeddings,
            targets=spec.targets or None,
        ),
        setup=setup,
        rows=tuple(
            row
            for model in models
            for row in model_rows(family, base, model, setup, spec.fit_bytes)
        ),
        fit_bytes=spec.fit_bytes,
        fits=_fits(spec, family, config, setup),
        notes=tuple(
            report_notes(
                family,
                config,
                spec.strategy,
                ratios,
                counted=any(m.zeros for m in models),
                processes=spec.processes,
            )
        ),
    )


def _setup(spec: MemoryReportSpec, config: dict[str, Any]) -> "TrainingSetup":
    from loram_cli.memory.setup import TrainingSetup, usual_attention

    names = {field.name for field in fields(TrainingSetup)} & {field.name for field in fields(spec)}
    values = {name: getattr(spec, name) for name in names}
    if spec.attention == "auto":
        values["attention"] = usual_attention(config)
    return TrainingSetup(**values)


def _fits(
    spec: MemoryReportSpec, family: "Family", config: dict[str, Any], setup: "TrainingSetup"
) -> tuple[FitAnswer, ...]:
    # Zeros of semi and unst take their place in memory, and a pruned model is not pruned again.
    if spec.fit_bytes is None or spec.strategy in ("semi", "unst"):
        return ()
    if config.get("per_layer_config"):
        return ()
    keeps = (spec.keep_first, spec.keep_last)
    return tuple(fit_answers(family, config, setup, keeps, spec.multiple_of, spec.fit_bytes))


def _base_config(spec: MemoryReportSpec) -> dict[str, Any]:
    if spec.preset is not None:
        from loram_cli.memory.presets import load_preset

        return load_preset(spec.preset)
    assert spec.model is not None
    return _read_config(spec.model)


def _read_config(model: Path) -> dict[str, Any]:
    # Imported here alone: the checkpoint floor brings torch, which a preset can do without.
    from loram_cli.checkpoint.index import read_config, read_json

    return read_json(model) if model.is_file() else read_config(model)


def _checked_family(config: dict[str, Any], where: str) -> "Family":
    from loram_cli.arch.registry import family_for

    family = family_for(config, where)
    try:
        shapes = family.tensor_shapes(config)
    except KeyError as error:
        raise LoramError(f"{where}: config.json has no {error.args[0]}") from error
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise LoramError(f"{where}: config.json is not sound ({error})") from error
    for name, shape in shapes.items():
        if not all(type(width) is int and width > 0 for width in shape):
            raise LoramError(
                f"{where}: config.json gives tensor {name} the impossible shape {list(shape)}"
            )
    return family


def _narrowed_or_sparse(
    spec: MemoryReportSpec, family: "Family", config: dict[str, Any], ratios: tuple[float, ...]
) -> Iterator[Model]:
    from loram_cli.pruning.plan import layer_widths, pruned_config

    geometry = family.geometry(config)
    for ratio in ratios:
        name = f"{spec.strategy} {ratio:g}"
        if spec.strategy in ("semi", "unst"):
            yield Model(name, config, ratio, sparsity=ratio)
        else:
            widths = layer_widths(
                geometry, ratio, spec.keep_first, spec.keep_last, spec.multiple_of
            )
            yield Model(name, pruned_config(config, geometry, widths), ratio)


def _pruned_directory(
    pruned: Path, family: "Family", base: dict[str, Any], source: str, reporter: Reporter
) -> Model:
    config = _read_config(pruned)
    mine = _checked_family(config, str(pruned)).geometry(config)
    theirs = family.geometry(base)
    for what, small, full in (
        ("model_type", config["model_type"], base["model_type"]),
        ("hidden_size", mine.hidden_size, theirs.hidden_size),
        ("vocab_size", mine.vocab_size, theirs.vocab_size),
        ("num_hidden_layers", len(mine.layers), len(theirs.layers)),
    ):
        if small != full:
            raise LoramError(
                f"{pruned}: was not pruned from {source}: its {what} is {small}, the base's {full}",
                "pass the base that was pruned as --model",
            )
    zeros = 0
    if (pruned / MANIFEST_NAME).is_file() and Manifest.read(pruned).sparsity:
        zeros = count_zeros(pruned, reporter)
    return Model(pruned.resolve().name, config, zeros=zeros)
